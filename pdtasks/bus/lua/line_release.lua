-- Hand a line over to whoever claims or drops next. It counts as no try unless it is lost.

local running, held, tries = KEYS[1], KEYS[2], KEYS[3]
local entry, number, token = unpack(ARGV)

if redis.call('HGET', held, number) ~= token then return end
redis.call('HSET', held, number, '-')
redis.call('HINCRBY', tries, number, -1)
redis.call('ZADD', running, 0, entry)
