-- How transitions are born, and records of n steps after them.

-- The transitions from a decision on, up to n, an end, a switch, or one without a reward; or nil and who is still open.
local function chain_from(id)
  local steps, d = {}, load_decision(id)
  while d and #steps < n_step do
    if not d.closed then return nil, d.id end
    if d[19] == '' or (steps[1] and has(d[10], SWITCHED)) then break end
    steps[#steps + 1] = d
    d = d[15] == 'none' and d[16] ~= '' and load_decision(d[16]) or nil
  end
  return steps
end

local function write_steps(id)
  local steps, open = chain_from(id)
  if not steps then
    c('RPUSH', B .. ':kw:' .. open, id)
    c('PEXPIRE', B .. ':kw:' .. open, successor_ttl)
    return
  end
  local d, final = steps[1], steps[#steps]
  if not d then return end
  local ids, rewards, log_propensities, joins = {}, {}, {}, {}
  for i, each in ipairs(steps) do ids[i], rewards[i], log_propensities[i], joins[i] = each.id, each[19], each[9], each[14] end
  local n, nm, ending = '', '', final[15]
  if final[17] == 'reward' then
    n = final[18][7]
  elseif final[16] ~= '' then
    local following = load_decision(final[16])
    if following then n, nm = following[6], following[7] else ending = 'lost' end  -- its record has expired
  end
  local function list(texts) return table.concat(texts, ',') end
  c('XADD', B .. ':nstep', '*', 'v', 1, 'i', d.id, 'p', d[11], 'e', d[12], 'q', d[13], 'ep', d[1], 'st', d[2],
    't', d[4], 'a', d[5], 's', d[6], 'm', d[7], 'd', d[8], 'k', #steps, 'ids', list(ids), 'rs', list(rewards),
    'lps', list(log_propensities), 'js', list(joins), 'x', ending,
    'b', (ending == 'none' or ending == 'truncated') and '1' or '0', 'n', n, 'nm', nm, 'ni', final[16], 'o', final[17])
end

-- The only place where a transition is born.
local function finish(d, state, ending, r, nxt)
  local bootstrap = (ending == 'none' or ending == 'truncated') and '1' or '0'
  local ni, n, nm, order = unpack(nxt or {'', '', '', ''})
  local reward = ''
  if state == 'joined' then reward = r[8] elseif state == 'defaulted' then reward = default_reward end
  c('XADD', B .. ':transitions', '*', 'v', 1, 'i', d.id, 'p', d[11], 'e', d[12], 'q', d[13], 'ep', d[1], 'st', d[2],
    't', d[4], 'a', d[5], 's', d[6], 'm', d[7], 'd', d[8], 'r', reward, 'j', state, 'x', ending,
    'b', bootstrap, 'n', n, 'nm', nm, 'ni', ni, 'o', order, 'at', r and r[3] or '',
    'ri', r and r[1] or '', 'rd', r and r[9] or '', 'tf', r and r[5] % 4 or 0)
  births[state] = births[state] + 1
  d[14], d[15], d[16], d[17], d[18], d[19], d.closed = state, ending, ni, order, r or false, reward, true
  store_closed(d)
  c('ZREM', DUE, d.id)
  if r then c('DEL', B .. ':r:' .. d.id) end
  forget(d)
  if n_step > 1 then
    write_steps(d.id)
    local waiters = c('LRANGE', B .. ':kw:' .. d.id, 0, -1)
    if waiters[1] then c('DEL', B .. ':kw:' .. d.id) end
    for _, id in ipairs(waiters) do write_steps(id) end
  end
end

-- Close a decision that has its reward, if how it ends is known. `timed_out`: nothing more is waited for.
local function settle(d, r, timed_out)
  local sent = r[7] ~= '' and {'', r[7], '', 'reward'} or nil
  local nowhere = d[1] == '' and 'single' or 'lost'
  if voided(d, r) then return finish(d, 'void', nowhere, r, nil) end
  if not in_range(r[8]) then
    c('XADD', B .. ':quarantined', '*', 'i', d.id, 'r', r[8], 'ri', r[1], 'at', r[3], 'rd', r[9])
    return finish(d, 'quarantined', nowhere, r, nil)
  end
  if has(r[5], TERMINATED) then return finish(d, 'joined', 'terminated', r, sent) end
  -- The episode was cut here: a later step of the same name is not what this action led to.
  if has(r[5], TRUNCATED) then return finish(d, 'joined', sent and 'truncated' or 'lost', r, sent) end
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
  if r and r[10] then settle(d, r, false) end
end
