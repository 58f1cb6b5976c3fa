-- Hold a job for another lease. Returns 'lost', 'held' or 'cancel'.

local record, running = KEYS[1], KEYS[2]
local id, token, lease_s = unpack(ARGV)

if redis.call('HGET', record, 'token') ~= token then return 'lost' end
redis.call('ZADD', running, now + lease_s, id)
keep(running, record)
return redis.call('HGET', record, 'cancel') and 'cancel' or 'held'
