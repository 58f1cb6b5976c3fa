-- Nobody wants a batch any more: whoever tends it ends it. One that has ended stays as it is.

local record = KEYS[1]

local status = redis.call('HGET', record, 'status')
if status == 'validating' or status == 'in_progress' then
  redis.call('HSET', record, 'status', 'cancelling', 'cancelling_at', math.floor(now), 'lease_until', 0)
  -- What is not checked to its end is no work yet.
  if status == 'validating' then redis.call('DEL', record .. ':lines') end
end
