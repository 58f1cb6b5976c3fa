-- Append an event (or none: ''), set fields of the record. Returns 0 when another one runs the job.

local record, events = KEYS[1], KEYS[2]
local token, event = ARGV[1], ARGV[2] -- then fields and values

if redis.call('HGET', record, 'token') ~= token then return 0 end
if event ~= '' then
  redis.call('XADD', events, '*', 'd', event)
  if redis.call('TTL', events) < 0 then
    redis.call('EXPIRE', events, redis.call('TTL', record))
  end
end
if #ARGV > 2 then redis.call('HSET', record, unpack(ARGV, 3)) end
return 1
