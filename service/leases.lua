-- The bank of exploration: one atomic call that takes a holder's report and leases it the next portion of every cap.
--
-- Promise: under each window the ceilings of all holders, dead ones included, add up to the cap at most; so what is
-- explored under it never passes the cap, whoever dies, whatever request or answer is lost or comes late.
-- Strategy: windows are fixed, by the server's clock, which may stand still here but never goes back. A ceiling counts
-- as spent until its holder reports less; requests carry absolute numbers and a sequence number, so that one that comes
-- twice or late changes nothing. A bank that has lost its memory, or finds that it was set back (a holder knows of an
-- answer that the bank has no record of), does not know what was spent: it grants nothing more in the running windows.
-- safety/lease.py is the holder's side; docs/exploration.md explains both.
--
-- KEYS[1]  base B, "sf:{policy}"; every other key begins with it
-- ARGV[1]  safety.lease.Request, as msgpack
-- Reply    safety.lease.Reply, as msgpack, or "STALE": a later request of this holder was here before
--
-- Keys     B:explore              hash: the caps in force, how far schedules have come, decisions per second, the halt
--          B:explore:<kind>:<window_ms>:<index>   hash of one window: g, the sum of ceilings; u, used, as reported;
--                                 d, decisions reported; h:<holder> -> "seq ceiling used decisions"; expires after its end
--          B:burn                 hash: "<width_ms>:<index>:n" outcomes of explored decisions, ":x" those that burnt

local c = redis.call
local q = cmsgpack.unpack(ARGV[1])
local B = KEYS[1]
local META, BURN = B .. ':explore', B .. ':burn'
local HOLDER = 'h:' .. q.holder
local FIRST_MS = 50  -- as in safety/pace.py
local RIVAL_MS = 10000  -- holders of a newer configuration count as gone after such a silence
local SET_BACK_MS = 86400000  -- a clock set back by more is believed, and what was known forgotten
local KEPT_MS = 86400000  -- how long the bank remembers beyond the longest window
local AMPLE = 100  -- units in the pool from which even a holder without traffic gets one

local function whole(number) return string.format('%.0f', number) end
local function exact(number) return string.format('%.17g', number) end

local now = q.now_ms
if now == 0 then
  local time = c('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local meta = {}
local function load_meta()
  local flat = c('HGETALL', META)
  for i = 1, #flat, 2 do meta[flat[i]] = flat[i + 1] end
end
load_meta()
if meta.t and now < tonumber(meta.t) - SET_BACK_MS then
  c('DEL', META)
  meta = {}
end
local clock = now
now = math.max(now, tonumber(meta.t or 0))

local function record(key)
  local text = c('HGET', key, HOLDER)
  if not text then return 0, 0, 0, 0 end
  local seq, ceiling, used, decisions = string.match(text, '^(%d+) (%d+) (%d+) (%d+)$')
  return tonumber(seq), tonumber(ceiling), tonumber(used), tonumber(decisions)
end

-- The configuration in force: the newest that a holder still lives by. Two that overlap must not both lend.
local changes = {}
local function set(field, value)
  meta[field] = value
  changes[#changes + 1] = field
  changes[#changes + 1] = value
end
local rival = meta.gen and q.generation < tonumber(meta.gen) and now - tonumber(meta.gen_t) < RIVAL_MS
if not rival then
  set('gen', whole(q.generation))
  set('gen_t', whole(now))
  set('caps', cmsgpack.pack(q.caps))
  if meta.schedules ~= q.progress.schedules then
    set('schedules', q.progress.schedules)
    set('total', '0')
    set('began', whole(now))
  end
end
local caps = cmsgpack.unpack(meta.caps)

-- Look at every window before the first write.
local windows, longest = {}, 0
for _, cap in ipairs(caps) do
  local kind, limit, span, unit = cap[1], cap[2], cap[3], cap[4]
  local index = math.floor(now / span)
  local w = {kind = kind, limit = limit, span = span, unit = unit, name = whole(span) .. ':' .. whole(index)}
  w.starts, w.ends = index * span, (index + 1) * span
  w.key = META .. ':' .. kind .. ':' .. w.name
  w.seq, w.ceiling, w.used, w.decisions = record(w.key)
  if q.seq <= w.seq then return 'STALE' end
  windows[#windows + 1], longest = w, math.max(longest, span)
end

-- How fast all holders decide, and how far schedules have come. Approximate: an answer that is lost counts twice.
local rate, rate_t, rate_since = tonumber(meta.rate or 0), tonumber(meta.rate_t or now), tonumber(meta.rate_since or now)
rate = rate * math.exp((rate_t - now) / q.meter_ms) + q.wanting * 1000 / q.meter_ms
set('rate', exact(rate))
set('rate_t', whole(now))
set('rate_since', whole(rate_since))
local seen = math.max(FIRST_MS, now - rate_since)
local fleet_rate = math.max(q.rate, rate / (1 - math.exp(-seen / q.meter_ms)))
if meta.schedules == q.progress.schedules then  -- a holder may know more than a bank that has lost its memory
  set('total', whole(math.max(tonumber(meta.total), q.progress.decisions) + q.decisions))
  set('began', whole(math.min(tonumber(meta.began), now - q.progress.elapsed_ms)))
end

local function grant(w, used, offered, capacity)
  local available = capacity - (w.granted - w.ceiling) - used
  local part = fleet_rate > 0 and q.rate / fleet_rate or 1
  local fair = math.max(0, available) * part
  -- Enough for a term, three renewals, at the pace at which all of it would be spent by the end, and for a row more.
  local earns = w.kind == 'share' and w.limit * q.all_rate or 0
  local need = q.term_ms * (fair / (w.ends - now) + earns / 1000) + w.unit
  local least = (q.rate > 0 or available >= AMPLE * w.unit) and w.unit or 0
  local target = math.max(least, math.min(math.ceil(fair), math.ceil(need)))
  return math.max(offered, used + math.max(0, math.min(available, target)))
end

local purses = {}
for _, w in ipairs(windows) do
  local purse = q.purses[w.kind]
  if not purse or purse.window ~= w.name then purse = {ceiling = 0, used = 0, decisions = 0, acked = 0} end
  -- From when on windows are known from their beginning. Another length of window begins anew.
  local field, opened = 'open:' .. w.kind, nil
  local span, at = string.match(meta[field] or '', '^(%d+):(%d+)$')
  if span == whole(w.span) then opened = tonumber(at) else opened = q.start_now and 0 or now end
  if purse.acked > w.seq then opened = now end  -- set back: that answer is not in this memory
  set(field, whole(w.span) .. ':' .. whole(opened))
  local closed = w.starts <= opened
  w.granted = tonumber(c('HGET', w.key, 'g') or 0)
  local decided = tonumber(c('HGET', w.key, 'd') or 0) + math.max(0, purse.decisions - w.decisions)
  local capacity = w.kind == 'share' and math.floor(w.limit * decided) or w.limit
  local ceiling = purse.used
  if not closed and not q.release then ceiling = grant(w, purse.used, purse.ceiling, capacity) end
  w.granted = w.granted - w.ceiling + ceiling
  local spent = tonumber(c('HGET', w.key, 'u') or 0) + math.max(0, purse.used - w.used)
  c('HSET', w.key, 'g', whole(w.granted), 'u', whole(spent), 'd', whole(decided), HOLDER,
    table.concat({whole(q.seq), whole(ceiling), whole(purse.used), whole(math.max(purse.decisions, w.decisions))}, ' '))
  c('PEXPIRE', w.key, whole(w.ends - clock + 60000))
  local pool = closed and 0 or math.max(0, capacity - w.granted)
  purses[#purses + 1] = {w.kind, w.name, ceiling, w.ends - now, pool, w.limit, closed, spent}
end

-- The halt: a holder proposes what it becomes, and is heard if nobody has moved it meanwhile.
local stands = meta.burn and cmsgpack.unpack(meta.burn) or {'running', 0}
if stands[1] == q.was[1] and stands[2] == q.was[2] then stands = q.will end
set('burn', cmsgpack.pack(stands))
local buckets = {}
if q.burn_width_ms > 0 then
  local sums, gone, flat = {}, {}, c('HGETALL', BURN)
  for i = 1, #flat, 2 do
    local width, index, what = string.match(flat[i], '^(%d+):(%d+):(%a)$')
    if tonumber(index) * tonumber(width) < now - q.burn_long_ms - tonumber(width) then
      gone[#gone + 1] = flat[i]
    elseif tonumber(width) == q.burn_width_ms then
      sums[index] = sums[index] or {tonumber(index), 0, 0}
      sums[index][what == 'n' and 2 or 3] = tonumber(flat[i + 1])
    end
  end
  for first = 1, #gone, 1000 do c('HDEL', BURN, unpack(gone, first, math.min(#gone, first + 999))) end
  for _, bucket in pairs(sums) do buckets[#buckets + 1] = bucket end
end

set('t', whole(now))
c('HSET', META, unpack(changes))
c('PEXPIRE', META, whole(2 * longest + KEPT_MS))
local progress = {schedules = meta.schedules, decisions = tonumber(meta.total), elapsed_ms = now - tonumber(meta.began)}
return cmsgpack.pack({now, purses, fleet_rate, progress, stands, buckets})
