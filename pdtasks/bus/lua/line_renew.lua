-- Hold a line for another lease. Returns 'lost', 'held', 'late' or 'cancel'.

local record, running, held = KEYS[1], KEYS[2], KEYS[3]
local entry, number, token, lease_s = unpack(ARGV)

if redis.call('HGET', held, number) ~= token then return 'lost' end
redis.call('ZADD', running, now + lease_s, entry)
local status, expires_at = unpack(redis.call('HMGET', record, 'status', 'expires_at'))
if status == 'cancelling' then return 'cancel' end
return tonumber(expires_at) <= now and 'late' or 'held'
