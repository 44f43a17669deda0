-- The reward join: one atomic call that applies a batch of a lane's events and moves time forward.
--
-- Promise: every decision gives exactly one transition, whatever order, repetition or delay its events arrive in.
-- Strategy: rows at or below a lane's last applied seq are skipped, a batch beyond last + 1 is answered GAP, so lost
-- replies, restarts, failovers and restored backups are one case. Time is event time: a deadline fires only when every
-- producer heard of within max_lag has shipped through it. docs/join.md explains; service/join.py has the same as a
-- table and as a slow model in Python.
--
-- KEYS[1]  base B, "sf:{policy}"; every other key begins with it
-- ARGV     producer, epoch, first_seq, count, through_ms, now_ms (0: the server's clock), force, bye, max_lag_ms,
--          sweep_limit, record_ttl_ms, successor_ttl_ms, default_reward, then blobs of events (service/decision.py)
-- Reply    {"GAP", last} or {"OK", last, {seq, verdict, …}, {joined, defaulted, void, late, orphan}, pending}
--
-- Keys     B:wm  lane -> last seq and when     B:ev  lane -> event time shipped through, and when heard
--          B:d:<id>  decision, "P"ending without expiry or "C"losed with record_ttl        B:r:<id>  waiting reward
--          B:due  pending decisions by deadline     B:early  rewards that wait for their decision, by patience
--          B:e:<episode>  step -> id     B:t:<episode>  ids without a step by event time     B:ord  those, over all episodes
--          B:transitions, B:late, B:orphan  streams     B:lost  lane -> events that are gone

local B = KEYS[1]
local c = redis.call
local pack, unpack_one = cmsgpack.pack, cmsgpack.unpack
local producer, epoch = ARGV[1], ARGV[2]
local first, count = tonumber(ARGV[3]), tonumber(ARGV[4])
local through, now = tonumber(ARGV[5]), tonumber(ARGV[6])
local force, bye = ARGV[7] == '1', ARGV[8] == '1'
local max_lag, sweep_limit = tonumber(ARGV[9]), tonumber(ARGV[10])
local record_ttl, successor_ttl, default_reward = tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13]
local WM, EV, DUE, EARLY, ORD = B .. ':wm', B .. ':ev', B .. ':due', B .. ':early', B .. ':ord'
local LANE = producer .. ':' .. epoch
local WM_KEPT_MS, WM_PRUNED_ABOVE = 7 * 86400000, 64
local TERMINATED, TRUNCATED, NOT_EXECUTED = 1, 2, 8

if now == 0 then
  local time = c('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function pair(text)
  if not text then return nil end
  local one, two = string.match(text, '^(%d+):(%d+)$')
  return tonumber(one), tonumber(two)
end

local last = pair(c('HGET', WM, LANE)) or 0
if first > last + 1 then
  if not force then return {'GAP', last} end
  c('HINCRBY', B .. ':lost', LANE, first - last - 1)  -- the spool holds them no more: trainers are told
end

-- The low watermark: the least event time that some producer heard of lately has yet to ship beyond.
local function watermark()
  local low = nil
  local all = c('HGETALL', EV)
  for i = 2, #all, 2 do
    local t, heard = pair(all[i])
    if now - heard < max_lag and (not low or t < low) then low = t end
  end
  return low or 0
end
local low = watermark()
local births = {joined = 0, defaulted = 0, void = 0}
local lates, orphans = 0, 0

local function bit(flags, mask) return math.floor(flags / mask) % 2 == 1 end

-- Records: arrays, so that packing keeps their order. Decision: 1 episode, 2 step, 3 due, 4 at, 5 action, 6 state,
-- 7 mask, 8 record, 9 producer, 10 epoch, 11 seq; closed ones add 12 join state, 13 end, 14 next id, 15 order, 16 reward
-- (or false). Reward: 1 reward_id, 2 digest, 3 at, 4 until, 5 flags, 6 executed_action, 7 next_state, 8 reward, 9 record.
local function load_decision(id)
  local raw = c('GET', B .. ':d:' .. id)
  if not raw then return nil end
  local d = unpack_one(string.sub(raw, 2))
  d.id, d.closed = id, string.sub(raw, 1, 1) == 'C'
  return d
end

local function load_reward(id)
  local raw = c('GET', B .. ':r:' .. id)
  return raw and unpack_one(raw) or nil
end

local function keep_late(id, r, why)
  c('XADD', B .. ':late', '*', 'i', id, 'r', r[8], 'ri', r[1], 'at', r[3], 'rd', r[9], 'w', why)
  lates = lates + 1
end

-- An episode's step -> id; the mark says that the step before it has closed and asks for it no more.
local MARK = '!'

local function at_step(episode, step)
  local id = c('HGET', B .. ':e:' .. episode, step)
  if not id then return nil, false end
  if string.sub(id, 1, 1) == MARK then return string.sub(id, 2), true end
  return id, false
end

-- The successor that is certain by now: step + 1, or without steps the next by event time once the watermark has passed.
local function successor(d)
  if d[1] == '' then return nil end
  if d[2] >= 0 then
    local id = at_step(d[1], d[2] + 1)
    return id and load_decision(id) or nil, 'step'
  end
  local key = B .. ':t:' .. d[1]
  local rank = c('ZRANK', key, d.id)
  if not rank then return nil end
  local found = c('ZRANGE', key, rank + 1, rank + 1, 'WITHSCORES')
  if not found[1] or tonumber(found[2]) > low then return nil end
  return load_decision(found[1]), 'time'
end

-- Drop what no predecessor can ask for any more, so that an endless episode stays small.
local function forget(d)
  if d[1] == '' then return end
  if d[2] >= 0 then
    local key = B .. ':e:' .. d[1]
    local nid = at_step(d[1], d[2] + 1)
    if nid then
      if c('GETRANGE', B .. ':d:' .. nid, 0, 0) == 'P' then c('HSET', key, d[2] + 1, MARK .. nid)
      else c('HDEL', key, d[2] + 1) end
    end
    local _, marked = at_step(d[1], d[2])
    if marked then c('HDEL', key, d[2]) end
    return
  end
  local key = B .. ':t:' .. d[1]
  for _ = 1, 8 do
    local head = c('ZRANGE', key, 0, 0)[1]
    if not head or c('GETRANGE', B .. ':d:' .. head, 0, 0) == 'P' then return end
    c('ZREM', key, head)
  end
end

-- The only place where a transition is born.
local function finish(d, state, r, ending, nxt, order, next_state)
  local bootstrap = ending == 'none' or (ending == 'truncated')
  local n, nm, ni = next_state or '', '', ''
  if nxt then n, nm, ni = nxt[6], nxt[7], nxt.id end
  local reward = ''
  if state == 'joined' then reward = r[8] elseif state == 'defaulted' then reward = default_reward end
  c('XADD', B .. ':transitions', '*', 'v', 1, 'i', d.id, 'p', d[9], 'e', d[10], 'q', d[11], 'ep', d[1], 'st', d[2],
    't', d[4], 'a', d[5], 's', d[6], 'm', d[7], 'd', d[8], 'r', reward, 'j', state, 'x', ending,
    'b', bootstrap and '1' or '0', 'n', n, 'nm', nm, 'ni', ni, 'o', order or '', 'at', r and r[3] or '',
    'ri', r and r[1] or '', 'rd', r and r[9] or '', 'tf', r and r[5] % 4 or 0)
  births[state] = births[state] + 1
  local closed = {}
  for i = 1, 11 do closed[i] = d[i] end
  closed[12], closed[13], closed[14], closed[15], closed[16] = state, ending, ni, order or '', r or false
  -- A predecessor that is still open may ask for this state later than record_ttl.
  local ttl = d[1] ~= '' and math.max(record_ttl, successor_ttl) or record_ttl
  c('SET', B .. ':d:' .. d.id, 'C' .. pack(closed), 'PX', ttl)
  c('ZREM', DUE, d.id)
  if r then c('DEL', B .. ':r:' .. d.id) end
  d.closed = true
  forget(d)
end

local function voided(d, r) return bit(r[5], NOT_EXECUTED) or (r[6] >= 0 and r[6] ~= d[5]) end

-- Close a decision that has its reward, if how it ends is known; `timed_out`: nothing more is waited for.
local function settle(d, r, timed_out)
  local sent = r[7] ~= '' and r[7] or nil
  local order = sent and 'reward' or ''
  if voided(d, r) then return finish(d, 'void', r, 'lost', nil, '', nil) end
  if bit(r[5], TERMINATED) then return finish(d, 'joined', r, 'terminated', nil, order, sent) end
  if bit(r[5], TRUNCATED) then return finish(d, 'joined', r, sent and 'truncated' or 'lost', nil, order, sent) end
  if sent then return finish(d, 'joined', r, 'none', nil, order, sent) end
  if d[1] == '' then return finish(d, 'joined', r, 'single', nil, '', nil) end
  local nxt, by = successor(d)
  if nxt then return finish(d, 'joined', r, 'none', nxt, by, nil) end
  if timed_out then return finish(d, 'joined', r, 'lost', nil, '', nil) end
end

-- Decision and reward may both be here now.
local function try(d)
  if not d or d.closed then return end
  local r = load_reward(d.id)
  if not r then return end
  if r[3] > d[3] then
    keep_late(d.id, r, 'late')
    c('DEL', B .. ':r:' .. d.id)
    return
  end
  settle(d, r, false)
end

local function on_decision(event, seq)
  local id, episode, step = event[1], event[2], event[3]
  local d = {episode, step, event[4], event[5], event[6], event[7], event[8], event[9], producer, epoch, seq}
  if not c('SET', B .. ':d:' .. id, 'P' .. pack(d), 'NX') then return end
  d.id = id
  c('ZADD', DUE, event[4], id)
  c('ZREM', EARLY, id)
  if episode ~= '' then
    if step >= 0 then
      local key = B .. ':e:' .. episode
      c('HSET', key, step, step == 0 and MARK .. id or id)
      c('PEXPIRE', key, successor_ttl)
      local before = at_step(episode, step - 1)
      if before then try(load_decision(before)) end
    else
      local key = B .. ':t:' .. episode
      c('ZADD', key, event[5], id)
      c('PEXPIRE', key, successor_ttl)
      c('ZADD', ORD, event[5], id)
    end
  end
  try(d)
end

-- Give the verdict on one reward. Its decision may be pending, closed or not here yet.
local function on_reward(event)
  local id = event[1]
  local r = {event[2], event[3], event[4], event[5], event[6], event[7], event[8], event[9], event[10]}
  local d = load_decision(id)
  local standing = load_reward(id)
  if d and d.closed then standing = d[16] or nil end
  if standing then
    if standing[1] ~= r[1] then
      keep_late(id, r, 'closed')
      return 'late'
    end
    return standing[2] == r[2] and 'duplicate' or 'conflict'
  end
  if not d then
    c('SET', B .. ':r:' .. id, pack(r))
    c('ZADD', EARLY, r[4], id)
    return 'early'
  end
  if d.closed or r[3] > d[3] then
    keep_late(id, r, r[3] > d[3] and 'late' or 'overtaken')
    return 'late'
  end
  c('SET', B .. ':r:' .. id, pack(r))
  settle(d, r, false)
  return 'joined'
end

local verdicts = {}
local seq = first
for k = 14, #ARGV do
  local events = unpack_one(ARGV[k])
  for i = 1, #events do
    if seq > last then
      local event = events[i]
      if event[#event] == 'D' then
        on_decision(event, seq)
      else
        verdicts[#verdicts + 1] = seq
        verdicts[#verdicts + 1] = on_reward(event)
      end
    end
    seq = seq + 1
  end
end
last = math.max(last, first + count - 1)
c('HSET', WM, LANE, last .. ':' .. now)
if bye then
  c('HDEL', EV, LANE)
else
  local before = pair(c('HGET', EV, LANE)) or 0
  c('HSET', EV, LANE, math.max(before, through) .. ':' .. now)
end

-- Time moves: first who follows whom, then deadlines, then rewards that never found their decision.
low = watermark()
for _, id in ipairs(c('ZRANGE', ORD, '-inf', low, 'BYSCORE', 'LIMIT', 0, sweep_limit)) do
  local d = load_decision(id)
  if d then
    local key = B .. ':t:' .. d[1]
    local rank = c('ZRANK', key, id)
    if rank and rank > 0 then try(load_decision(c('ZRANGE', key, rank - 1, rank - 1)[1])) end
    try(d)
  end
  c('ZREM', ORD, id)
end
for _, id in ipairs(c('ZRANGE', DUE, '-inf', low, 'BYSCORE', 'LIMIT', 0, sweep_limit)) do
  local d = load_decision(id)
  if not d or d.closed then
    c('ZREM', DUE, id)
  else
    local r = load_reward(id)
    if r then
      settle(d, r, true)
    elseif d[1] == '' then
      finish(d, 'defaulted', nil, 'single', nil, '', nil)
    else
      local nxt, by = successor(d)
      finish(d, 'defaulted', nil, nxt and 'none' or 'lost', nxt, nxt and by or '', nil)
    end
  end
end
for _, id in ipairs(c('ZRANGE', EARLY, '-inf', low, 'BYSCORE', 'LIMIT', 0, sweep_limit)) do
  local r = load_reward(id)
  if r then
    c('XADD', B .. ':orphan', '*', 'i', id, 'r', r[8], 'ri', r[1], 'at', r[3], 'rd', r[9])
    c('DEL', B .. ':r:' .. id)
    orphans = orphans + 1
  end
  c('ZREM', EARLY, id)
end
if c('HLEN', WM) > WM_PRUNED_ABOVE then
  local all = c('HGETALL', WM)
  for i = 1, #all, 2 do
    local _, heard = pair(all[i + 1])
    if now - heard > WM_KEPT_MS then
      c('HDEL', WM, all[i])
      c('HDEL', EV, all[i])
    end
  end
end
return {'OK', last, verdicts, {births.joined, births.defaulted, births.void, lates, orphans}, c('ZCARD', DUE)}
