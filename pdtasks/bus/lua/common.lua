-- What all scripts share: the server's clock, its memory, and indexes that outlive none of their records.

local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6 -- UNIX seconds

local function keep(index, record)
  local left = redis.call('PTTL', record)
  if left <= 0 then return end -- (without an end: none of ours)
  redis.call('PEXPIRE', index, left, 'NX')
  redis.call('PEXPIRE', index, left, 'GT')
end

-- May `bytes` more be kept, with `most` (a part of maxmemory) for what is no token?
local function has_room(most, bytes)
  local memory = redis.pcall('INFO', 'memory')
  if type(memory) == 'table' and memory.err then return true end -- this user may not ask
  local used = tonumber(string.match(memory, 'used_memory:(%d+)'))
  local all = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  return all == 0 or used + bytes <= all * most
end
