-- A file is whole: from now on it is there. Returns 0 when a piece has been lost meanwhile.

local record, files = KEYS[1], KEYS[2]
local id, ttl_s, parts = ARGV[1], ARGV[2], tonumber(ARGV[3]) -- then fields and values

for part = 0, parts - 1 do
  if redis.call('EXPIRE', record .. ':' .. part, ttl_s) == 0 then return 0 end
end
redis.call('HSET', record, unpack(ARGV, 4))
redis.call('EXPIRE', record, ttl_s)
redis.call('ZADD', files, now, id)
keep(files, record)
return 1
