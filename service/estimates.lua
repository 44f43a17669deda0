-- What the reader of live estimates asks of Redis: a page of transitions, and how far time has come; and its save.
--
-- Promise: a page and the time through which all is closed are of one moment. A save is all or nothing, and happens only
-- if nobody has saved since the state that it goes on from; the group's mark moves with it, so that nothing is trimmed
-- that whoever goes on has to read again. It works at the memory cap, for a mark that stood still would keep the stream.
--
-- KEYS[1]  base B, "sf:{policy}"
-- ARGV     "read", group, "(" and the id to read after, most entries, "1" for states
--          -> {last id in the stream, entries ever added, now_ms, closed_ms, group was there, {id, i, ep, st, t, a, s, m,
--             d, r, j, x, tf}, …}
--          "begin" -> {last id in the stream, entries ever added, now_ms}
--          "save", group, version expected, version, low id, "1" to forget all else, most names, how long to keep it
--          all in ms, n, n × (digest, time), m, m × (field, value), fields to delete -> 1, or 0: somebody else has saved
--          "end", group -> 1 if there was something to end
--
-- Keys     B:estimates  hash: version, head, view, t:<label>     B:estimates:through  names of units that are through,
--          by when they were last seen     B:horizon, B:due  the join's     B:transitions  the stream, with the group
--          B:alone:transitions  `trim.lua`'s

local c = redis.call
local B = KEYS[1]
local STREAM, STATE, THROUGH = B .. ':transitions', B .. ':estimates', B .. ':estimates:through'
local verb, group = ARGV[1], ARGV[2]

local function mapped(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

local function there()
  if c('EXISTS', STREAM) == 0 then return false end
  for _, flat in ipairs(c('XINFO', 'GROUPS', STREAM)) do
    if mapped(flat).name == group then return true end
  end
  return false
end

local function now_ms()
  local time = c('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function ending()
  if c('EXISTS', STREAM) == 0 then return '0-0', 0 end
  local info = mapped(c('XINFO', 'STREAM', STREAM))
  return info['last-generated-id'], info['entries-added']
end

local function set_mark(id)
  if there() then c('XGROUP', 'SETID', STREAM, group, id) else c('XGROUP', 'CREATE', STREAM, group, id, 'MKSTREAM') end
end

if verb == 'begin' then
  local last, added = ending()
  return {last, added, now_ms()}
end

if verb == 'end' then
  local some = c('DEL', STATE, THROUGH)
  if there() then some = some + c('XGROUP', 'DESTROY', STREAM, group) end
  return some > 0 and 1 or 0
end

if verb == 'read' then
  local from, most, with_state = ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1'
  local last, added = ending()
  c('HDEL', B .. ':alone:transitions', group)  -- no consumer of it asks, but it is read: `trim.lua` keeps the time here
  local due = c('ZRANGE', B .. ':due', 0, 0, 'WITHSCORES')
  local closed = tonumber(c('GET', B .. ':horizon') or 0)
  if due[2] then closed = math.min(closed, tonumber(due[2]) - 1) end
  local reply = {last, added, now_ms(), string.format('%.0f', closed), there() and 1 or 0}
  for _, entry in ipairs(c('XRANGE', STREAM, from, '+', 'COUNT', most)) do
    local f = mapped(entry[2])
    reply[#reply + 1] = {entry[1], f.i, f.ep, f.st, f.t, f.a, with_state and f.s or '', f.m, f.d, f.r, f.j, f.x, f.tf}
  end
  return reply
end

if (c('HGET', STATE, 'version') or '0') ~= ARGV[3] then return 0 end
if ARGV[6] == '1' then c('DEL', STATE, THROUGH) end
local at = 9
local function following()
  at = at + 1
  return ARGV[at]
end
c('HSET', STATE, 'version', ARGV[4])
set_mark(ARGV[5])
for _ = 1, tonumber(ARGV[9]) do
  local digest, seen = following(), following()
  c('ZADD', THROUGH, seen, digest)
end
c('ZREMRANGEBYRANK', THROUGH, 0, -tonumber(ARGV[7]) - 1)
for _ = 1, tonumber(following()) do
  local field, value = following(), following()
  c('HSET', STATE, field, value)
end
while at < #ARGV do c('HDEL', STATE, following()) end
c('PEXPIRE', STATE, ARGV[8])
c('PEXPIRE', THROUGH, ARGV[8])
return 1
