-- Trims one stream of a policy, and tells how it stands: one atomic call, so that no group comes up unseen in between.
--
-- Promise: where there are groups, no entry goes at or past the first that any of them has yet to acknowledge. It works
-- at the memory cap too (`trimming.py` puts the flag `allow-oom` in front), for that is when it is needed.
-- Strategy: `~` frees whole nodes only, which costs next to nothing; LIMIT bounds the call, and keeps the newest `keep`.
-- Without groups entries go by age, then by size. Nothing is told to Redis's ACKED option: MINID alone is exact enough.
-- Groups of the service itself (`surefoot.…`) are no readers: they hold what they need, but what they have had is not read.
-- With them alone entries go by age as far as they allow, and by size: who needs more than fits begins anew.
--
-- KEYS[1]  base B, "sf:{policy}"
-- ARGV     stream, max_age_ms, max_bytes, keep, settle_ms, limit (0: only tell)
-- Reply    false without the stream, else {gone, {entries, bytes or -1, first id, last id}, now_ms, more, groups}; a group
--          is {name, consumers, pending, lag or -1, last delivered, first needed, idle_ms}
--
-- Keys     B:<stream>     B:alone:<stream>  groups without a consumer -> since when in ms: Redis remembers no time for them

local c = redis.call
local KEY, ALONE = KEYS[1] .. ':' .. ARGV[1], KEYS[1] .. ':alone:' .. ARGV[1]
local max_age, max_bytes, keep = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local settle, limit = tonumber(ARGV[5]), tonumber(ARGV[6])

local time = c('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function whole(number) return string.format('%.0f', number) end

local function mapped(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

-- Parts of ids may have 20 digits, which no number of Lua holds: of two without leading zeros the longer is greater.
local function less(one, two)
  if #one ~= #two then return #one < #two end
  return one < two
end

local function before(one, two)
  local ms, seq = string.match(one, '^(%d+)-(%d+)$')
  local other_ms, other_seq = string.match(two, '^(%d+)-(%d+)$')
  if ms ~= other_ms then return less(ms, other_ms) end
  return less(seq, other_seq)
end

if c('EXISTS', KEY) == 0 then
  if limit > 0 then c('DEL', ALONE) end
  return false
end

-- How long nobody has asked for the group's entries. What was asked in vain counts as asked.
local alone = {}
local function idle_ms(name, consumers)
  if consumers == 0 then
    local since = c('HGET', ALONE, name)
    if not since and limit > 0 then c('HSET', ALONE, name, whole(now)) end
    alone[name] = true
    return math.max(0, now - tonumber(since or now))
  end
  local least = nil
  for _, flat in ipairs(c('XINFO', 'CONSUMERS', KEY, name)) do
    local idle = mapped(flat).idle
    if not least or idle < least then least = idle end
  end
  return least
end

local groups, hold, trainers = {}, nil, 0
for _, flat in ipairs(c('XINFO', 'GROUPS', KEY)) do
  local g = mapped(flat)
  local delivered = g['last-delivered-id']
  local needed = delivered
  if g.pending > 0 then
    local first = c('XPENDING', KEY, g.name)[2]
    if before(first, needed) then needed = first end
  end
  if not hold or before(needed, hold) then hold = needed end
  if string.sub(g.name, 1, 9) ~= 'surefoot.' then trainers = trainers + 1 end
  groups[#groups + 1] = {g.name, g.consumers, g.pending, g.lag or -1, delivered, needed, idle_ms(g.name, g.consumers)}
end
if limit > 0 then
  for _, name in ipairs(c('HKEYS', ALONE)) do
    if not alone[name] then c('HDEL', ALONE, name) end
  end
end

local function trim(strategy, threshold, most)
  if most < 1 then return 0 end
  return c('XTRIM', KEY, strategy, '~', threshold, 'LIMIT', whole(most))
end

local function bytes()
  local usage = redis.pcall('MEMORY', 'USAGE', KEY, 'SAMPLES', 20)
  return type(usage) == 'number' and usage or -1  -- an access list may forbid it: then size is no reason
end

local function until_ms(ms) return whole(math.max(0, ms)) .. '-0' end

local length = c('XLEN', KEY)
local gone, size = 0, nil
if limit > 0 and trainers > 0 then
  local settled = until_ms(now - settle)
  if before(settled, hold) then hold = settled end
  gone = trim('MINID', hold, math.min(limit, length - keep))
elseif limit > 0 then
  local old = until_ms(now - max_age)
  if hold and before(hold, old) then old = hold end
  gone = trim('MINID', old, limit)
  size = bytes()
  if size > max_bytes then
    local over = trim('MAXLEN', whole(math.floor((length - gone) * max_bytes / size)), limit)
    if over > 0 then size = nil end
    gone = gone + over
  end
end

local first = c('XRANGE', KEY, '-', '+', 'COUNT', 1)[1]
local last = mapped(c('XINFO', 'STREAM', KEY))['last-generated-id']
local more = limit > 0 and gone * 2 >= limit and 1 or 0  -- stopped by LIMIT, not by what may go
return {gone, {length - gone, size or bytes(), first and first[1] or '', last}, now, more, groups}
