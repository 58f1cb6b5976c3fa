-- What all scripts share: the server's clock, and indexes that outlive none of their records.

local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6 -- UNIX seconds

local function keep(index, record)
  local left = redis.call('PTTL', record)
  if left <= 0 then return end -- (without an end: none of ours)
  redis.call('PEXPIRE', index, left, 'NX')
  redis.call('PEXPIRE', index, left, 'GT')
end
