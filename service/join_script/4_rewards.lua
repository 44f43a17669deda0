-- What rewards do to decisions that are here, that are not here yet, and to whole episodes.

-- Until when rewards of a decision count, by event time; there is one part at least. More parts never make it later.
local function closing(d, parts)
  local til, earliest = d[3], parts[1][3]
  for _, r in ipairs(parts) do
    earliest = math.min(earliest, r[3])
    local last_word = has(r[5], FINAL) or has(r[5], TERMINATED) or has(r[5], TRUNCATED) or voided(d, r)
    if last_word then til = math.min(til, r[3]) end
  end
  local ended = d[1] ~= '' and tonumber(c('GET', B .. ':x:' .. d[1]) or nil) or nil
  return ended and math.min(til, math.max(ended, earliest)) or til
end

local function scalar(parts)
  if aggregation == 'first' then return parts[1][8] end
  if aggregation == 'last' or #parts == 1 then return parts[#parts][8] end
  local chosen, total = parts[1][8], 0
  for _, r in ipairs(parts) do
    local value = tonumber(r[8])
    total = total + value
    if aggregation == 'max' and value > tonumber(chosen) or aggregation == 'min' and value < tonumber(chosen) then
      chosen = r[8]
    end
  end
  if aggregation == 'max' or aggregation == 'min' then return chosen end
  return string.format('%.17g', aggregation == 'sum' and total or total / #parts)
end

-- This is the decision's reward from now on.
local function stand(d, r, parts, til, timed_out)
  r[10], r[11] = {}, til
  for i, part in ipairs(parts) do r[10][i] = {part[1], part[2]} end
  settle(d, r, timed_out)
  if not d.closed then c('SET', B .. ':r:' .. d.id, pack({r})) end
  return d[14] == 'quarantined' and 'quarantined' or 'joined'
end

-- Make one reward of those that were collected: what the last of them says, with all their flags.
local function gather(d, list, timed_out)
  local til, counted = closing(d, list), {}
  for _, r in ipairs(list) do
    if r[3] <= til then counted[#counted + 1] = r else put_aside(d.id, r, 'closed') end
  end
  table.sort(counted, function(a, b) return a[3] < b[3] or (a[3] == b[3] and a[1] < b[1]) end)
  local final = counted[#counted]
  local flags, executed, sent = 0, '', ''
  for _, mask in ipairs({TERMINATED, TRUNCATED, FINAL, NOT_EXECUTED}) do
    for _, r in ipairs(counted) do
      if has(r[5], mask) then flags = flags + mask break end
    end
  end
  for _, r in ipairs(counted) do
    if r[6] ~= '' then executed = r[6] end
    if r[7] ~= '' then sent = r[7] end
  end
  c('SREM', B .. ':o:' .. d[1], d.id)
  local r = {final[1], final[2], final[3], final[4], flags, executed, sent, scalar(counted), final[9]}
  stand(d, r, counted, til, timed_out)
  if not d.closed then c('ZADD', DUE, d[3], d.id) end
end

-- An episode has ended: those of its decisions that have rewards close at that time.
local function end_episode(episode, at)
  local key = B .. ':x:' .. episode
  local before = c('GET', key)
  if before and tonumber(before) <= at then return end
  c('SET', key, whole(at), 'PX', episode_ttl)
  for _, id in ipairs(c('SMEMBERS', B .. ':o:' .. episode)) do
    local d, list = load_decision(id), waiting(id)
    if d and not d.closed and list[1] then c('ZADD', DUE, closing(d, list), id) end
  end
end

local function collect(d, parts, r)
  parts[#parts + 1] = r
  c('SET', B .. ':r:' .. d.id, pack(parts))
  if d[1] ~= '' then
    c('SADD', B .. ':o:' .. d[1], d.id)
    c('PEXPIRE', B .. ':o:' .. d[1], episode_ttl)
    if has(r[5], TERMINATED) or has(r[5], TRUNCATED) then end_episode(d[1], r[3]) end
  end
  c('ZADD', DUE, closing(d, parts), d.id)
  return 'joined'
end

-- The default has left, but the reward was there in time.
local function correct(d, r)
  r[10], r[11] = {{r[1], r[2]}}, d[3]
  local state = voided(d, r) and 'void' or in_range(r[8]) and 'joined' or 'quarantined'
  c('XADD', B .. ':correction', '*', 'v', 1, 'i', d.id, 'p', d[11], 'e', d[12], 'q', d[13], 'j', state,
    'r', state == 'joined' and r[8] or '', 'ri', r[1], 'at', r[3], 'rd', r[9], 'w', 'overtaken')
  d[18] = r
  store_closed(d)
  corrections = corrections + 1
  return 'correction'
end

-- Judge a reward of a decision that is here.
local function judge(d, r)
  local parts, standing = said_of(d)
  for _, part in ipairs(parts) do
    if part[1] == r[1] then return part[2] == r[2] and 'duplicate' or 'conflict' end
  end
  if parts[1] and aggregation == 'first' then return put_aside(d.id, r, 'closed') end
  if r[3] > d[3] then return put_aside(d.id, r, 'late') end
  if parts[1] and r[3] > (standing and standing[11] or closing(d, parts)) then return put_aside(d.id, r, 'closed') end
  if d.closed or standing then
    if d[14] == 'defaulted' and not standing then return correct(d, r) end
    return put_aside(d.id, r, 'overtaken')
  end
  if #parts >= REWARDS_KEPT then return put_aside(d.id, r, 'closed') end
  if aggregation ~= 'first' then return collect(d, parts, r) end
  return stand(d, r, {r}, d[3], false)
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
  if #list >= REWARDS_KEPT then return put_aside(id, r, 'closed') end
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

-- A reward for a whole episode: which decision was the last shows when everybody has shipped through it.
local function on_episode(event)
  local episode, reward_id, digest, at = event[1], event[2], event[3], event[4]
  local key = B .. ':g:' .. episode
  local told = c('HGET', key, reward_id)
  if told then return told == digest and 'duplicate' or 'conflict' end
  c('HSET', key, reward_id, digest)
  c('PEXPIRE', key, episode_ttl)
  local member = reward_id .. '\0' .. episode
  c('HSET', WHOLE, member, pack(event))
  c('ZADD', ENDS, at, member)
  if aggregation ~= 'first' then end_episode(episode, at) end
  return 'early'
end

-- Give an episode's reward to its last decision.
local function give(event)
  local raw = c('GET', B .. ':z:' .. event[1])
  local d = raw and load_decision(unpack_one(raw)[3])
  if d then return judge(d, {event[2], event[3], event[4], event[5], event[6], '', '', event[7], event[8]}) end
  c('XADD', B .. ':orphan', '*', 'i', '', 'r', event[7], 'ri', event[2], 'at', event[4], 'rd', event[8], 'ep', event[1])
  orphans = orphans + 1
end
