-- Limits on executions, in Redis: one call settles what holders tell, then reserves for rows and leases portions.
--
--   {base}:lim:k:<digest of a key>   the past of a key     {base}:lim:all   the past of the whole policy
--   {base}:lim:h:<holder>            its last call, and the last thing it told that was applied
--   {base}:lim:memory                the token of this memory, and when it was found that an earlier one was lost
--
-- A past is `safety/past.py`, verb by verb: [orders, expires, last order, last action (false: unknown), last time, holds,
-- charges by field, askers by field]. A hold is [name, until, order, amounts by field]; charges are
-- [window, cap, times, amounts, total]; a limit comes as [field, window, cap, levels (need, charge, need, charge, ...)].
-- Time is this server's. Numbers are whole and below 2^53.
--
-- ARGV: holder, number of the call, number of its first tell, token that the holder knows, token to take if there is
-- none, time (0: the server's), msgpack of [keyed limits, policy's limits, how many of these are for rows, tells, rows,
-- asks, hold ms, lease ms, for how long a key's last action is kept (0: it is not), may executions have gone untold].
--   tell {1, name, key, charges of the key, charges of the policy or false, action, order, age}, charges being a list of
--   field, window, cap and amount for each; or {2, field, window, cap, covered, beyond}
--   row {name, key, entries for keyed limits, entries for the policy's}; an entry is the least charge (all levels may be
--   come to), or a list of it and the levels
--   ask {limit, held, wanted}
-- Gives {'STALE'}, or {token, rows, asks}: a row as {order, previous, rooms...}, an ask as {total, share or -1}.
local EXACT, BINS = 64, 1024
local base, holder = KEYS[1] .. ':lim:', ARGV[1]
local call, first, known, fresh, now = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5], tonumber(ARGV[6])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local request = cmsgpack.unpack(ARGV[7])
local keyed, whole, for_rows, tells, rows, asks = request[1], request[2], request[3], request[4], request[5], request[6]
local HOLD, LEASE, remember, untold = request[7], request[8], request[9], request[10]

-- A call that its holder has given up must not reserve any more.
local said = redis.call('GET', base .. 'h:' .. holder)
local calls, told = 0, 0
if said then
  local at = string.find(said, ' ', 1, true)
  calls, told = tonumber(string.sub(said, 1, at - 1)), tonumber(string.sub(said, at + 1))
end
if call <= calls then return {'STALE'} end

local memory = redis.call('GET', base .. 'memory')
local token, lost
if memory then
  local at = string.find(memory, ' ', 1, true)
  token, lost = string.sub(memory, 1, at - 1), tonumber(string.sub(memory, at + 1))
else
  token, lost = fresh, 0
end
if (known ~= '' and known ~= token) or untold then lost = now end
local stands = token .. ' ' .. string.format('%d', lost)
if stands ~= memory then redis.call('SET', base .. 'memory', stands) end

-- The machine of `safety/past.py`.

local function forget(charges)
  local times, gone = charges[3], 0
  while times[gone + 1] and times[gone + 1] + charges[1] < now do
    gone = gone + 1
    charges[5] = charges[5] - charges[4][gone]
  end
  if gone > 0 then
    local late, amounts = {}, {}
    for i = gone + 1, #times do
      late[#late + 1], amounts[#amounts + 1] = times[i], charges[4][i]
    end
    charges[3], charges[4] = late, amounts
  end
end

local function add(charges, at, amount)
  local times, amounts = charges[3], charges[4]
  local index = #times
  while index > 0 and times[index] > at do index = index - 1 end
  charges[5] = charges[5] + amount
  local function bin(time) return math.floor(time * BINS / charges[1]) end
  if index > 0 and #times >= EXACT and bin(at) == bin(times[index]) then
    times[index], amounts[index] = at, amounts[index] + amount
  else
    table.insert(times, index + 1, at)
    table.insert(amounts, index + 1, amount)
  end
  while #times > 1 and charges[5] - amounts[1] >= charges[2] do
    charges[5] = charges[5] - amounts[1]
    table.remove(times, 1)
    table.remove(amounts, 1)
  end
end

local function turn(past)
  local kept = {}
  for _, hold in ipairs(past[6]) do
    if hold[2] <= now then
      for field, amount in pairs(hold[4]) do add(past[7][field], hold[2], amount) end
      if hold[3] > past[3] then past[3], past[4], past[5] = hold[3], false, hold[2] end
    else
      kept[#kept + 1] = hold
    end
  end
  past[6] = kept
  for _, charges in pairs(past[7]) do forget(charges) end
end

local function charges_of(past, limit)
  local charges = past[7][limit[1]]
  if not charges then
    charges = {limit[2], limit[3], {}, {}, 0}
    past[7][limit[1]] = charges
  elseif charges[1] ~= limit[2] or charges[2] ~= limit[3] then
    charges[1], charges[2] = limit[2], limit[3]
    forget(charges)
  end
  return charges
end

local function room(past, limit)
  local left = limit[3] - charges_of(past, limit)[5]
  for _, hold in ipairs(past[6]) do left = left - (hold[4][limit[1]] or 0) end
  return left
end

local function previous(past)
  for _, hold in ipairs(past[6]) do
    if hold[3] > 0 then return '?' end
  end
  if past[4] == false or (past[5] < lost and now < lost + remember) then return '?' end
  return past[4]
end

local function remove(past, name)
  for i, hold in ipairs(past[6]) do
    if hold[1] == name then return table.remove(past[6], i) end
  end
  return nil
end

local pasts = {}
local function load(key)
  local past = pasts[key]
  if not past then
    local raw = redis.call('GET', base .. key)
    past = raw and cmsgpack.unpack(raw) or {0, 0, 0, '', 0, {}, {}, {}}
    turn(past)
    pasts[key] = past
  end
  return past
end

-- After a loss nothing is granted until whatever was forgotten has left the window.
local function closed(limit)
  return lost > 0 and now < lost + LEASE + limit[2]
end

local function charge(past, list)
  for i = 1, #list, 4 do add(charges_of(past, {list[i], list[i + 1], list[i + 2]}), now, list[i + 3]) end
end

local function settle(tell)
  local name, key, action, order = tell[2], tell[3], tell[6], tell[7]
  if tell[5] then
    local past = load('all')
    remove(past, name)
    charge(past, tell[5])
  end
  if key == '' then return end
  local past = load('k:' .. key)
  local hold = remove(past, name)
  charge(past, tell[4])
  if action == '' then return end
  if hold then order = hold[3] end
  if order > 0 then
    if order >= past[3] then past[3], past[4], past[5] = order, action, now end
    return
  end
  -- Its holder got no answer, so nobody knows its place among others': it is the last only if none has executed since.
  local at = now - tell[8]
  past[1] = past[1] + 1
  past[3], past[4], past[5] = past[1], past[5] < at and action, math.max(past[5], at)
end

local function report(tell)
  local past, field, covered, beyond = load('all'), tell[2], tell[5], tell[6]
  for _, hold in ipairs(past[6]) do
    if hold[1] == holder .. '=' .. field then
      hold[4][field] = math.max(0, hold[4][field] - covered)
      beyond, covered = beyond + covered, 0
    end
  end
  -- Without a hold, what it covered has been charged when it ended.
  if beyond > 0 then add(charges_of(past, {field, tell[3], tell[4]}), now, beyond) end
end

for i, tell in ipairs(tells) do
  if first + i - 1 > told then
    if tell[1] == 1 then settle(tell) else report(tell) end
  end
end
told = math.max(told, first + #tells - 1)

local function worst(limit, entry, left)
  local levels, most = limit[4], 0
  local function meet(level)
    local need, amount = levels[2 * level - 1], levels[2 * level]
    if (need == 0 or need <= left) and amount > most then most = amount end
  end
  if type(entry) == 'number' then
    most = entry
    for level = 1, #levels / 2 do meet(level) end
  else
    most = entry[1]
    for i = 2, #entry do meet(entry[i]) end
  end
  return most
end

local function reserve(past, limits, count, entries, name, order, answer)
  local amounts, holds = {}, order > 0
  for i = 1, count do
    local left = closed(limits[i]) and 0 or room(past, limits[i])
    local amount = worst(limits[i], entries[i], left)
    charges_of(past, limits[i])
    answer[#answer + 1] = left
    if amount > 0 then amounts[limits[i][1]], holds = amount, true end
  end
  if holds then past[6][#past[6] + 1] = {name, now + HOLD, order, amounts} end
end

local reserved = {}
for i, row in ipairs(rows) do
  local answer = {0, ''}
  if row[2] ~= '' then
    local past = load('k:' .. row[2])
    if remember > 0 then
      answer[2] = previous(past)
      past[1] = past[1] + 1
      answer[1] = past[1]
    end
    reserve(past, keyed, #keyed, row[3], row[1], answer[1], answer)
  else
    for _ = 1, #keyed do answer[#answer + 1] = -1 end
  end
  if for_rows > 0 then reserve(load('all'), whole, for_rows, row[4], row[1], 0, answer) end
  reserved[i] = answer
end

-- Portions. Those who hold nothing and wait are served in the order in which they were served last.

local function others(past, limit)
  local field, waiting, count, first_in_line = limit[1], false, 1, true
  local askers = past[8][field] or {}
  past[8][field] = askers
  local me = askers[holder] or {0, 0, 0}
  askers[holder] = me
  for name, each in pairs(askers) do
    if each[1] < now - 2 * LEASE and name ~= holder then
      askers[name] = nil
    elseif name ~= holder then
      count = count + 1
      if each[3] == 1 then
        waiting = true
        if each[2] < me[2] or (each[2] == me[2] and name < holder) then first_in_line = false end
      end
    end
  end
  return me, count, waiting, first_in_line
end

local function quantum(limit)
  local most = 0
  for i = 1, #limit[4], 2 do most = math.max(most, limit[4][i]) end
  return most
end

local function lease(past, limit, held, wanted)
  local field, name = limit[1], holder .. '=' .. limit[1]
  local before = remove(past, name)
  local left = room(past, limit)
  held = math.min(held, before and before[4][field] or math.max(left, 0))
  local me, count, waiting, first_in_line = others(past, limit)
  local pool, one = left, quantum(limit)
  for _, hold in ipairs(past[6]) do
    if hold[1] ~= name and string.find(hold[1], '=', 1, true) then pool = pool + (hold[4][field] or 0) end
  end
  local share, spare = math.floor(pool / count), -1
  if share < one then
    spare = waiting and 0 or -1
    share = (held > 0 or first_in_line) and one or 0
  elseif count > 1 then
    spare = share
  end
  local more = closed(limit) and 0 or math.max(0, math.min(wanted, left - held, share - held))
  if more > 0 then me[2] = now end
  me[1], me[3] = now, (held + more == 0 and wanted > 0) and 1 or 0
  if wanted == 0 and held == 0 then past[8][field][holder] = nil end
  if held + more > 0 then past[6][#past[6] + 1] = {name, now + LEASE, 0, {[field] = held + more}} end
  return {held + more, spare}
end

local granted = {}
for i, ask in ipairs(asks) do granted[i] = lease(load('all'), whole[ask[1]], ask[2], ask[3]) end

local function longest(limits)
  local most = 0
  for _, limit in ipairs(limits) do most = math.max(most, limit[2]) end
  return most
end
local lasts = {k = math.max(longest(keyed) + HOLD, remember), a = longest(whole) + 2 * LEASE + HOLD}
for key, past in pairs(pasts) do
  if #past[6] == 0 then
    for field, charges in pairs(past[7]) do
      if #charges[3] == 0 then past[7][field] = nil end
    end
  end
  if #past[6] == 0 and past[1] == 0 and next(past[7]) == nil and next(past[8]) == nil then
    redis.call('DEL', base .. key)
  else
    past[2] = math.max(past[2], now + lasts[string.sub(key, 1, 1)])
    redis.call('SET', base .. key, cmsgpack.pack(past), 'PX', string.format('%d', past[2] - now))
  end
end
redis.call('SET', base .. 'h:' .. holder, string.format('%d %d', call, told), 'PX', 3600000)
return {token, reserved, granted}
