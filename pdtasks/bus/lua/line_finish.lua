-- Write the outcome of a line, once. Returns 0 when another one runs it, or has; 2: it was the last.

local record, running, held, tries = unpack(KEYS)
local files, entry, number, token, which, text = unpack(ARGV)

if redis.call('HGET', held, number) ~= token then return 0 end
redis.call('ZREM', running, entry)
redis.call('HDEL', held, number)
redis.call('HDEL', tries, number)
append(record, files, which, text)
redis.call('HINCRBY', record, which == 'output' and 'completed' or 'failed', 1)
return redis.call('LLEN', record .. ':lines') + redis.call('ZCARD', running) == 0 and 2 or 1
