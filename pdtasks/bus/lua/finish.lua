-- End a job once. Returns 0 when another one runs it, or there is none.

local record, events, running, waiting, all = unpack(KEYS)
local id, token, ttl_s = ARGV[1], ARGV[2], ARGV[3] -- then fields and values, `finished_at` with them

if redis.call('EXISTS', record) == 0 then return 0 end
-- A job that nobody runs has no token.
if (redis.call('HGET', record, 'token') or '') ~= token then return 0 end
redis.call('ZREM', running, id)
redis.call('ZREM', waiting, id)
if redis.call('HEXISTS', record, 'finished_at') == 1 then return 1 end
redis.call('HSET', record, 'token', '', unpack(ARGV, 4))
redis.pcall('XADD', events, '*', 'end', redis.call('HGET', record, 'state')) -- if it is a stream
redis.call('EXPIRE', record, ttl_s)
redis.call('EXPIRE', events, ttl_s)
keep(all, record)
return 1
