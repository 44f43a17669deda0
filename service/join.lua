-- The reward join: one atomic call that applies a batch of a lane's events and moves time forward.
--
-- Promise: every decision gives exactly one transition, whatever order, repetition or delay its events arrive in.
-- Strategy: rows at or below a lane's last applied seq are skipped, a batch beyond last + 1 is answered GAP, so lost
-- replies, restarts, failovers and restored backups are one case. Time is event time: a deadline fires only when every
-- producer heard of within max_lag has shipped through it. docs/join.md explains; service/join.py has the same as a
-- table and as a slow model in Python, and the tests compare the two call by call.
--
-- KEYS[1]  base B, "sf:{policy}"; every other key begins with it
-- ARGV     producer, epoch, first_seq, count, through_ms, now_ms (0: the server's clock), force, bye, max_lag_ms,
--          sweep_limit, record_ttl_ms, successor_ttl_ms, default_reward, then blobs of events (service/decision.py)
-- Reply    {"GAP", last} or {"OK", last, {seq, verdict, …}, {joined, defaulted, void, late, orphan, lost}, pending}
--
-- Keys     B:wm  lane -> last seq         B:seen  lanes by until when wm keeps them     B:lost  lane -> events gone
--          B:ev  lane -> event time shipped through, and when heard     B:up  since when calls come without a break
--          B:horizon  event time up to which the order of decisions is settled     B:hold  no deadline before this
--          B:d:<id>  decision, "P"ending without expiry or "C"losed with record_ttl
--          B:r:<id>  the reward that stands, or those that wait for their decision      B:l:<id>  late ones, told once
--          B:due  pending decisions by deadline     B:early  rewards that wait for their decision, by patience
--          B:e:<episode>:<step>  a state until its predecessor closes     B:w:<episode>:<step>  who waits for this step
--          B:t:<episode>  ids without a step by event time      B:s:<id>  their states      B:ord  all of them, by time
--          B:transitions, B:late, B:orphan  streams

local B = KEYS[1]
local c = redis.call
local pack, unpack_one = cmsgpack.pack, cmsgpack.unpack
local producer, epoch = ARGV[1], ARGV[2]
local first, count = tonumber(ARGV[3]), tonumber(ARGV[4])
local through, now = tonumber(ARGV[5]), tonumber(ARGV[6])
local force, bye = ARGV[7] == '1', ARGV[8] == '1'
local max_lag, sweep_limit = tonumber(ARGV[9]), tonumber(ARGV[10])
local record_ttl, successor_ttl, default_reward = tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13]
local WM, SEEN, EV, UP, HOLD, HORIZON = B .. ':wm', B .. ':seen', B .. ':ev', B .. ':up', B .. ':hold', B .. ':horizon'
local DUE, EARLY, ORD = B .. ':due', B .. ':early', B .. ':ord'
local LANE = producer .. ':' .. epoch
-- How long a lane's last seq is kept after its last call. Forgotten too soon, what its spool still holds would be applied
-- again and give second transitions: so long, unless it said bye, which a lane does once nothing is left.
local KEPT_MS, KEPT_AFTER_BYE_MS, FORGOTTEN = 90 * 86400000, 7 * 86400000, 16
local BREAK_MS = 10000  -- shippers call every second: a longer silence means that Redis was away, not the producers
local EARLY_KEPT, LATE_TOLD = 8, 64  -- for one decision
local TERMINATED, TRUNCATED, NOT_EXECUTED = 1, 2, 8

if now == 0 then
  local time = c('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Open and check all events before the first write: what a failing script has written stays written.
local DECISION = {'string', 'string', 'number', 'number', 'number', 'string', 'string', 'string', 'string', 'string'}
local REWARD = {'string', 'string', 'string', 'number', 'number', 'number', 'string', 'string', 'string', 'string', 'string'}
local events = {}
for k = 14, #ARGV do
  for _, event in ipairs(unpack_one(ARGV[k])) do
    local shape = event[#event] == 'D' and DECISION or REWARD
    if #event ~= #shape then error('an event of ' .. #event .. ' columns') end
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
  if count > 0 then oldest = math.min(oldest, events[1][#events[1] == #DECISION and 5 or 4]) end
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
local births = {joined = 0, defaulted = 0, void = 0}
local lates, orphans = 0, 0

local function bit(flags, mask) return math.floor(flags / mask) % 2 == 1 end
local function at_step(kind, episode, step) return B .. kind .. episode .. ':' .. whole(step) end

-- Records: arrays, so that packing keeps their order. Decision: 1 episode, 2 step, 3 due, 4 at, 5 action, 6 state,
-- 7 mask, 8 record, 9 producer, 10 epoch, 11 seq; closed ones add 12 join state, 13 end, 14 next id, 15 order, 16 reward
-- (or false). Reward: 1 reward_id, 2 digest, 3 at, 4 until, 5 flags, 6 executed_action, 7 next_state, 8 reward, 9 record.
-- What follows a decision: 1 id, 2 state, 3 mask, 4 order.
local function load_decision(id)
  local raw = c('GET', B .. ':d:' .. id)
  if not raw then return nil end
  local d = unpack_one(string.sub(raw, 2))
  d.id, d.closed = id, string.sub(raw, 1, 1) == 'C'
  return d
end

local function waiting(id)
  local raw = c('GET', B .. ':r:' .. id)
  return raw and unpack_one(raw) or {}
end

-- Keep a reward that changes nothing on the `late` stream, once for each reward_id.
local function put_aside(id, r, why)
  local key = B .. ':l:' .. id
  local told = c('HGET', key, r[1])
  if told then return told == r[2] and 'late' or 'conflict' end
  if c('HLEN', key) < LATE_TOLD then c('HSET', key, r[1], r[2]) end
  c('PEXPIRE', key, record_ttl)
  c('XADD', B .. ':late', '*', 'i', id, 'r', r[8], 'ri', r[1], 'at', r[3], 'rd', r[9], 'w', why)
  lates = lates + 1
  return 'late'
end

-- The successor that is certain by now: step + 1, or without steps the next by event time up to the horizon.
local function successor(d)
  if d[1] == '' then return nil end
  local raw, order = nil, 'step'
  if d[2] >= 0 then
    raw = c('GET', at_step(':e:', d[1], d[2] + 1))
  else
    local key = B .. ':t:' .. d[1]
    local rank = c('ZRANK', key, d.id)
    if not rank then return nil end
    local found = c('ZRANGE', key, rank + 1, rank + 1, 'WITHSCORES')
    if not found[1] or tonumber(found[2]) > horizon then return nil end
    raw, order = c('GET', B .. ':s:' .. found[1]), 'time'
  end
  if not raw then return nil end
  local nxt = unpack_one(raw)
  nxt[4] = order
  return nxt
end

-- Without steps: drop from an episode's front what is closed and settled, for no predecessor is left to ask for it.
local function trim(episode)
  local key = B .. ':t:' .. episode
  for _ = 1, 8 do
    local head = c('ZRANGE', key, 0, 0, 'WITHSCORES')
    if not head[1] or tonumber(head[2]) > horizon or c('GETRANGE', B .. ':d:' .. head[1], 0, 0) == 'P' then return end
    c('ZREM', key, head[1])
    c('DEL', B .. ':s:' .. head[1])
  end
end

-- Drop what no predecessor can ask for any more, so that an endless episode stays small, and many ended ones too.
local function forget(d, ending)
  if d[1] == '' then return end
  if d[2] < 0 then return trim(d[1]) end
  local found = c('DEL', at_step(':e:', d[1], d[2] + 1))
  local want = at_step(':w:', d[1], d[2] + 1)
  if found == 1 or ending == 'terminated' or ending == 'truncated' then c('DEL', want)
  else c('SET', want, '', 'PX', successor_ttl) end  -- nobody will ask for that step
end

-- The only place where a transition is born.
local function finish(d, state, ending, r, nxt)
  local bootstrap = (ending == 'none' or ending == 'truncated') and '1' or '0'
  local ni, n, nm, order = unpack(nxt or {'', '', '', ''})
  local reward = ''
  if state == 'joined' then reward = r[8] elseif state == 'defaulted' then reward = default_reward end
  c('XADD', B .. ':transitions', '*', 'v', 1, 'i', d.id, 'p', d[9], 'e', d[10], 'q', d[11], 'ep', d[1], 'st', d[2],
    't', d[4], 'a', d[5], 's', d[6], 'm', d[7], 'd', d[8], 'r', reward, 'j', state, 'x', ending,
    'b', bootstrap, 'n', n, 'nm', nm, 'ni', ni, 'o', order, 'at', r and r[3] or '',
    'ri', r and r[1] or '', 'rd', r and r[9] or '', 'tf', r and r[5] % 4 or 0)
  births[state] = births[state] + 1
  local closed = {}
  for i = 1, 11 do closed[i] = d[i] end
  closed[12], closed[13], closed[14], closed[15], closed[16] = state, ending, ni, order, r or false
  c('SET', B .. ':d:' .. d.id, 'C' .. pack(closed), 'PX', record_ttl)
  c('ZREM', DUE, d.id)
  if r then c('DEL', B .. ':r:' .. d.id) end
  d.closed, d[16] = true, r
  forget(d, ending)
end

local function voided(d, r) return bit(r[5], NOT_EXECUTED) or (r[6] ~= '' and r[6] ~= d[5]) end

-- Close a decision that has its reward, if how it ends is known. `timed_out`: nothing more is waited for.
local function settle(d, r, timed_out)
  local sent = r[7] ~= '' and {'', r[7], '', 'reward'} or nil
  if voided(d, r) then return finish(d, 'void', d[1] == '' and 'single' or 'lost', r, nil) end
  if bit(r[5], TERMINATED) then return finish(d, 'joined', 'terminated', r, sent) end
  -- The episode was cut here: a later step of the same name is not what this action led to.
  if bit(r[5], TRUNCATED) then return finish(d, 'joined', sent and 'truncated' or 'lost', r, sent) end
  if sent then return finish(d, 'joined', 'none', r, sent) end
  if d[1] == '' then return finish(d, 'joined', 'single', r, nil) end
  local nxt = successor(d)
  if nxt then return finish(d, 'joined', 'none', r, nxt) end
  if timed_out then return finish(d, 'joined', 'lost', r, nil) end
  if d[2] >= 0 then c('SET', at_step(':w:', d[1], d[2] + 1), d.id, 'PX', successor_ttl) end
end

-- What a decision waited for may be here now.
local function try(id)
  local d = load_decision(id)
  if not d or d.closed then return end
  local r = waiting(id)[1]
  if r then settle(d, r, false) end
end

-- Judge a reward of a decision that is here.
local function judge(d, r)
  local standing = nil
  if d.closed then standing = d[16] or nil else standing = waiting(d.id)[1] end
  if standing and standing[1] == r[1] then return standing[2] == r[2] and 'duplicate' or 'conflict' end
  if standing then return put_aside(d.id, r, 'closed') end
  if r[3] > d[3] then return put_aside(d.id, r, 'late') end
  if d.closed then return put_aside(d.id, r, 'overtaken') end
  c('SET', B .. ':r:' .. d.id, pack({r}))
  settle(d, r, false)
  return 'joined'
end

-- Judge a reward of a decision that has not been shipped: in time or not shows when it comes, so all wait.
local function wait(id, r)
  local list = waiting(id)
  for i, other in ipairs(list) do
    if other[1] == r[1] then
      if other[2] ~= r[2] then return 'conflict' end
      if r[3] < other[3] then  -- sent twice: the copy that was accepted first counts
        list[i] = r
        c('SET', B .. ':r:' .. id, pack(list))
      end
      c('ZADD', EARLY, 'GT', r[4], id)
      return 'early'
    end
  end
  if #list >= EARLY_KEPT then return put_aside(id, r, 'closed') end
  list[#list + 1] = r
  c('SET', B .. ':r:' .. id, pack(list))
  c('ZADD', EARLY, 'GT', r[4], id)
  return 'early'
end

local function on_reward(event)
  local r = {event[2], event[3], event[4], event[5], event[6], event[7], event[8], event[9], event[10]}
  local d = load_decision(event[1])
  if d then return judge(d, r) end
  return wait(event[1], r)
end

-- Put a decision into its episode, as a successor and to be found by its own.
local function place(d)
  local key = B .. ':t:' .. d[1]
  if d[2] >= 0 then
    local before = c('GET', at_step(':w:', d[1], d[2]))
    if before == '' then
      c('DEL', at_step(':w:', d[1], d[2]))
    elseif d[2] > 0 then
      c('SET', at_step(':e:', d[1], d[2]), pack({d.id, d[6], d[7]}), 'PX', successor_ttl)
      if before then try(before) end
    end
  elseif d[4] > horizon then
    c('ZADD', key, d[4], d.id)
    c('PEXPIRE', key, successor_ttl)
    c('SET', B .. ':s:' .. d.id, pack({d.id, d[6], d[7]}), 'PX', successor_ttl)
    c('ZADD', ORD, d[4], d.id)
  end
end

local function on_decision(event, seq)
  local d = {event[2], event[3], event[4], event[5], event[6], event[7], event[8], event[9], producer, epoch, seq}
  if not c('SET', B .. ':d:' .. event[1], 'P' .. pack(d), 'NX') then return end
  d.id = event[1]  -- not before: with a name in it, it would be packed as a map
  c('ZADD', DUE, d[3], d.id)
  if d[1] ~= '' then place(d) end
  local list = waiting(d.id)
  if not list[1] then return end
  c('ZREM', EARLY, d.id)
  c('DEL', B .. ':r:' .. d.id)
  for _, r in ipairs(list) do judge(d, r) end
end

local verdicts = {}
for k, event in ipairs(events) do
  local seq = first + k - 1
  if seq > last then
    if event[#event] == 'D' then
      on_decision(event, seq)
    else
      verdicts[#verdicts + 1] = seq
      verdicts[#verdicts + 1] = on_reward(event)
    end
  end
end
last = math.max(last, first + count - 1)
c('HSET', WM, LANE, whole(last))
c('ZADD', SEEN, now + (bye and KEPT_AFTER_BYE_MS or KEPT_MS), LANE)
if bye then
  c('HDEL', EV, LANE)
else
  c('HSET', EV, LANE, whole(math.max(pair(c('HGET', EV, LANE)) or 0, through)) .. ':' .. whole(now))
end

-- Time moves. The low watermark: the least event time that some lane has yet to ship beyond.
local low = nil
local lanes = c('HGETALL', EV)
for i = 2, #lanes, 2 do
  local shipped, heard = pair(lanes[i])
  if silent(heard) then c('HDEL', EV, lanes[i - 1]) elseif not low or shipped < low then low = shipped end
end
if not low or now < hold then low = 0 end
if low > horizon then
  horizon = low
  c('SET', HORIZON, whole(horizon))
end

local function until_time(key, time) return ipairs(c('ZRANGE', key, '-inf', whole(time), 'BYSCORE', 'LIMIT', 0, sweep_limit)) end

-- First who follows whom, then deadlines, then rewards that never found their decision.
for _, id in until_time(ORD, horizon) do
  local d = load_decision(id)
  local rank = d and c('ZRANK', B .. ':t:' .. d[1], id)
  if rank and rank > 0 then try(c('ZRANGE', B .. ':t:' .. d[1], rank - 1, rank - 1)[1]) end
  if d then trim(d[1]) end
  c('ZREM', ORD, id)
end
for _, id in until_time(DUE, low) do
  local d = load_decision(id)
  if not d or d.closed then
    c('ZREM', DUE, id)
  else
    local r = waiting(id)[1]
    local nxt = not r and successor(d) or nil
    if r then settle(d, r, true) else finish(d, 'defaulted', nxt and 'none' or d[1] == '' and 'single' or 'lost', nil, nxt) end
  end
end
for _, id in until_time(EARLY, low) do
  for _, r in ipairs(waiting(id)) do
    c('XADD', B .. ':orphan', '*', 'i', id, 'r', r[8], 'ri', r[1], 'at', r[3], 'rd', r[9])
    orphans = orphans + 1
  end
  c('DEL', B .. ':r:' .. id)
  c('ZREM', EARLY, id)
end
for _, lane in ipairs(c('ZRANGE', SEEN, '-inf', whole(now), 'BYSCORE', 'LIMIT', 0, FORGOTTEN)) do
  c('HDEL', WM, lane)
  c('ZREM', SEEN, lane)
end
return {'OK', last, verdicts, {births.joined, births.defaulted, births.void, lates, orphans, lost}, c('ZCARD', DUE)}
