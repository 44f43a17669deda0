-- The call: apply the events, then let time pass.

-- Put a decision into its episode, as a successor and to be found by its own.
local function place(d)
  local latest, raw = B .. ':z:' .. d[1], c('GET', B .. ':z:' .. d[1])
  local step, at, id = unpack(raw and unpack_one(raw) or {-2})
  local by_time = d[2] >= 0 or (at and (d[4] > at or (d[4] == at and d.id > id)))
  if d[2] > step or (d[2] == step and by_time) then c('SET', latest, pack({d[2], d[4], d.id}), 'PX', episode_ttl) end
  if d[2] >= 0 then
    local before = c('GET', at_step(':w:', d[1], d[2]))
    if before == '' then
      c('DEL', at_step(':w:', d[1], d[2]))
    elseif d[2] > 0 then
      c('SET', at_step(':e:', d[1], d[2]), pack({d.id, d[6], d[7]}), 'PX', successor_ttl)
      if before then try(before) end
    end
  elseif d[4] > horizon then
    local key = B .. ':t:' .. d[1]
    c('ZADD', key, d[4], d.id)
    c('PEXPIRE', key, successor_ttl)
    c('SET', B .. ':s:' .. d.id, pack({d.id, d[6], d[7]}), 'PX', successor_ttl)
    c('ZADD', ORD, d[4], d.id)
  end
end

local function on_decision(event, seq)
  local d = {event[2], event[3], event[4], event[5], event[6], event[7], event[8], event[9], event[10], event[11],
    producer, epoch, seq}
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
  local seq, kind = first + k - 1, event[#event]
  if seq > last then
    if kind == 'D' then
      on_decision(event, seq)
    else
      verdicts[#verdicts + 1] = seq
      verdicts[#verdicts + 1] = kind == 'R' and on_reward(event) or kind == 'E' and on_episode(event)
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

local more = 0  -- whether there is work left that time alone will not bring
local function until_time(key, time)
  local found = c('ZRANGE', key, '-inf', whole(time), 'BYSCORE', 'LIMIT', 0, sweep_limit)
  if #found >= sweep_limit then more = 1 end
  return ipairs(found)
end

-- First who follows whom, then rewards of whole episodes, then deadlines, then rewards that never found their decision.
for _, id in until_time(ORD, horizon) do
  local d = load_decision(id)
  local rank = d and c('ZRANK', B .. ':t:' .. d[1], id)
  if rank and rank > 0 then try(c('ZRANGE', B .. ':t:' .. d[1], rank - 1, rank - 1)[1]) end
  if d then trim(d[1]) end
  c('ZREM', ORD, id)
end
for _, member in until_time(ENDS, low) do
  local raw = c('HGET', WHOLE, member)
  c('HDEL', WHOLE, member)
  c('ZREM', ENDS, member)
  if raw then give(unpack_one(raw)) end
end
for _, id in until_time(DUE, low) do
  local d = load_decision(id)
  if not d or d.closed then
    c('ZREM', DUE, id)
  else
    local list = waiting(id)
    local r = list[1]
    local nxt = not r and successor(d) or nil
    if not r then finish(d, 'defaulted', nxt and 'none' or d[1] == '' and 'single' or 'lost', nil, nxt)
    elseif r[10] then settle(d, r, true)
    else gather(d, list, d[3] <= low) end
  end
end
for _, id in until_time(EARLY, low) do
  for _, r in ipairs(waiting(id)) do
    c('XADD', B .. ':orphan', '*', 'i', id, 'r', r[8], 'ri', r[1], 'at', r[3], 'rd', r[9], 'ep', '')
    orphans = orphans + 1
  end
  c('DEL', B .. ':r:' .. id)
  c('ZREM', EARLY, id)
end
for _, lane in ipairs(c('ZRANGE', SEEN, '-inf', whole(now), 'BYSCORE', 'LIMIT', 0, FORGOTTEN)) do
  c('HDEL', WM, lane)
  c('ZREM', SEEN, lane)
end
return {'OK', last, verdicts,
  {births.joined, births.defaulted, births.void, births.quarantined, lates, corrections, orphans, lost}, c('ZCARD', DUE), more}
