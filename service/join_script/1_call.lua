-- The reward join: one atomic call that applies a batch of a lane's events and moves time forward.
--
-- Promise: every decision gives exactly one transition, whatever order, repetition or delay its events arrive in.
-- Strategy: rows at or below a lane's last applied seq are skipped, a batch beyond last + 1 is answered GAP, so lost
-- replies, restarts, failovers and restored backups are one case. Time is event time: a deadline fires only when every
-- producer heard of within max_lag has shipped through it. docs/join.md explains; service/join.py has the rules as a
-- table and as functions, service/join_model.py the whole as a slow model, and the tests compare the two call by call.
-- The files of this folder, in the order of their names, are one script.
--
-- KEYS[1]  base B, "sf:{policy}"; every other key begins with it
-- ARGV     producer, epoch, first_seq, count, through_ms, now_ms (0: the server's clock), force, bye, max_lag_ms,
--          sweep_limit, record_ttl_ms, successor_ttl_ms, default_reward, aggregation, low, high, n_step,
--          episode_ttl_ms, then blobs of events (service/decision.py)
-- Reply    {"GAP", last} or {"OK", last, {seq, verdict, …},
--          {joined, defaulted, void, quarantined, late, correction, orphan, lost}, pending, more (1: call again soon)}
--
-- Keys     B:wm  lane -> last seq         B:seen  lanes by until when wm keeps them     B:lost  lane -> events gone
--          B:ev  lane -> event time shipped through, and when heard     B:up  since when calls come without a break
--          B:horizon  event time up to which the order of decisions is settled     B:hold  no deadline before this
--          B:d:<id>  decision, "P"ending without expiry or "C"losed with record_ttl
--          B:r:<id>  the reward that stands, those collected, or those that wait for their decision
--          B:l:<id>  late ones, told once
--          B:due  pending decisions by when they close     B:early  rewards that wait for their decision, by patience
--          B:e:<episode>:<step>  a state until its predecessor closes     B:w:<episode>:<step>  who waits for this step
--          B:t:<episode>  ids without a step by event time      B:s:<id>  their states      B:ord  all of them, by time
--          B:z:<episode>  its last decision     B:x:<episode>  when it ended     B:o:<episode>  who collects in it
--          B:g:<episode>  rewards of the whole, reward_id -> digest     B:whole, B:ends  those not given yet, by time
--          B:kw:<id>  whose records of n steps wait for this one to close
--          B:transitions, B:nstep, B:late, B:correction, B:quarantined, B:orphan  streams

local B = KEYS[1]
local c = redis.call
local pack, unpack_one = cmsgpack.pack, cmsgpack.unpack
local producer, epoch = ARGV[1], ARGV[2]
local first, count = tonumber(ARGV[3]), tonumber(ARGV[4])
local through, now = tonumber(ARGV[5]), tonumber(ARGV[6])
local force, bye = ARGV[7] == '1', ARGV[8] == '1'
local max_lag, sweep_limit = tonumber(ARGV[9]), tonumber(ARGV[10])
local record_ttl, successor_ttl, default_reward = tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13]
local aggregation, lowest, highest, n_step = ARGV[14], tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17])
local episode_ttl = tonumber(ARGV[18])
local FIRST_BLOB = 19
local WM, SEEN, EV, UP, HOLD, HORIZON = B .. ':wm', B .. ':seen', B .. ':ev', B .. ':up', B .. ':hold', B .. ':horizon'
local DUE, EARLY, ORD, WHOLE, ENDS = B .. ':due', B .. ':early', B .. ':ord', B .. ':whole', B .. ':ends'
local LANE = producer .. ':' .. epoch
-- How long a lane's last seq is kept after its last call. Forgotten too soon, what its spool still holds would be applied
-- again and give second transitions: so long, unless it said bye, which a lane does once nothing is left.
local KEPT_MS, KEPT_AFTER_BYE_MS, FORGOTTEN = 90 * 86400000, 7 * 86400000, 16
local BREAK_MS = 10000  -- shippers call every second: a longer silence means that Redis was away, not the producers
local REWARDS_KEPT, LATE_TOLD = 64, 64  -- for one decision
local TERMINATED, TRUNCATED, FINAL, NOT_EXECUTED = 1, 2, 4, 8  -- flags of rewards
local SWITCHED = 1  -- of decisions

if now == 0 then
  local time = c('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Open and check all events before the first write: what a failing script has written stays written.
local S, N = 'string', 'number'
local SHAPES = {
  D = {S, S, N, N, N, S, S, S, S, S, N, S},
  R = {S, S, S, N, N, N, S, S, S, S, S},
  E = {S, S, S, N, N, N, S, S, S},
}
local AT = {D = 5, R = 4, E = 4}  -- where an event's time stands
local events = {}
for k = FIRST_BLOB, #ARGV do
  for _, event in ipairs(unpack_one(ARGV[k])) do
    local shape = SHAPES[event[#event]]
    if not shape or #event ~= #shape then error('an event of ' .. #event .. ' columns') end
    for i = 1, #shape do
      if type(event[i]) ~= shape[i] then error('column ' .. i .. ' of an event is no ' .. shape[i]) end
    end
    events[#events + 1] = event
  end
end
if #events ~= count then error('the blobs hold ' .. #events .. ' events, not ' .. count) end

local function whole(number) return string.format('%.0f', number) end

local function pair(text)
  if not text then return nil end
  local one, two = string.match(text, '^(%d+):(%d+)$')
  return tonumber(one), tonumber(two)
end

-- A lane holds deadlines back while it was heard of within max_lag, breaks in which nobody could call left out.
local since, called = pair(c('GET', UP))
if not since or now - called > BREAK_MS then since = now end
c('SET', UP, whole(since) .. ':' .. whole(now))
local function silent(heard) return now - math.max(heard, since) >= max_lag end

local known = c('HGET', WM, LANE)
local last = tonumber(known or 0)

-- Whether there may be lanes that the join does not know: this one has shipped what the join has forgotten, or it is new
-- and comes with what it recorded before anybody could call.
local function strangers()
  if first > last + 1 then
    local _, heard = pair(c('HGET', EV, LANE))
    return not heard or silent(heard)
  end
  local oldest = through + 1
  if count > 0 then oldest = math.min(oldest, events[1][AT[events[1][#events[1]]]]) end
  return not known and oldest < since - BREAK_MS
end

local hold = tonumber(c('GET', HOLD) or 0)
if now >= hold and strangers() then
  hold = now + max_lag  -- who is there shows within max_lag
  c('SET', HOLD, whole(hold))
end
if first > last + 1 and not force then return {'GAP', last} end
local lost = math.max(0, first - last - 1)
if lost > 0 then c('HINCRBY', B .. ':lost', LANE, lost) end  -- the spool holds them no more: trainers are told

-- Invariant: no decision is placed by time at or before the horizon any more.
local horizon = tonumber(c('GET', HORIZON) or 0)
local births = {joined = 0, defaulted = 0, void = 0, quarantined = 0}
local lates, corrections, orphans = 0, 0, 0
