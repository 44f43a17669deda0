-- What is kept of decisions and rewards.
--
-- Records: arrays, so that packing keeps their order. Decision: 1 episode, 2 step, 3 due, 4 at, 5 action, 6 state,
-- 7 mask, 8 record, 9 log propensity, 10 flags, 11 producer, 12 epoch, 13 seq; closed ones add 14 join state, 15 end,
-- 16 next id, 17 order, 18 the reward that stands (or false), 19 its number as the transition has it.
-- Reward: 1 reward_id, 2 digest, 3 at, 4 until, 5 flags, 6 executed_action, 7 next_state, 8 reward, 9 record; one that
-- stands adds 10 the {reward_id, digest} of all that went into it, 11 until when rewards counted.
-- What follows a decision: 1 id, 2 state, 3 mask, 4 order.

local function has(flags, mask) return math.floor(flags / mask) % 2 == 1 end
local function at_step(kind, episode, step) return B .. kind .. episode .. ':' .. whole(step) end

local function load_decision(id)
  local raw = c('GET', B .. ':d:' .. id)
  if not raw then return nil end
  local d = unpack_one(string.sub(raw, 2))
  d.id, d.closed = id, string.sub(raw, 1, 1) == 'C'
  return d
end

local function store_closed(d)
  local closed = {}  -- anew: with names in it, it would be packed as a map
  for i = 1, 19 do closed[i] = d[i] end
  c('SET', B .. ':d:' .. d.id, 'C' .. pack(closed), 'PX', record_ttl)
end

local function waiting(id)
  local raw = c('GET', B .. ':r:' .. id)
  return raw and unpack_one(raw) or {}
end

-- What was said of a decision so far, as a list that begins with reward_id and digest; and the reward that stands.
local function said_of(d)
  local list, standing = {}, nil
  if d.closed then standing = d[18] or nil else list = waiting(d.id) end
  if list[1] and list[1][10] then standing = list[1] end
  return standing and standing[10] or list, standing
end

local function in_range(text)
  local value = tonumber(text)
  return value - value == 0 and value >= lowest and value <= highest
end

local function voided(d, r) return has(r[5], NOT_EXECUTED) or (r[6] ~= '' and r[6] ~= d[5]) end

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
local function forget(d)
  if d[1] == '' then return end
  if d[2] < 0 then return trim(d[1]) end
  local found = c('DEL', at_step(':e:', d[1], d[2] + 1))
  local want = at_step(':w:', d[1], d[2] + 1)
  if found == 1 or d[15] == 'terminated' or d[15] == 'truncated' then c('DEL', want)
  else c('SET', want, '', 'PX', successor_ttl) end  -- nobody will ask for that step
end
