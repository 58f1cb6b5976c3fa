-- Take a job in, or find the one that came under the same key before. Returns 'digest id'.

local record, all, waiting, idempotency = KEYS[1], KEYS[2], KEYS[3], KEYS[4] -- (the last: or none)
local prefix, id, digest, ttl_s, most_forgotten = unpack(ARGV, 1, 5) -- then fields and values

if idempotency then
  local known = redis.pcall('GET', idempotency)
  local of = type(known) == 'string' and string.match(known, '^%x+ (job%-%x+)$')
  -- A job that ends early expires before its key.
  if of and redis.call('EXISTS', prefix .. of) == 1 then return known end
  redis.call('SET', idempotency, digest .. ' ' .. id, 'EX', ttl_s)
end
redis.call('HSET', record, unpack(ARGV, 6))
redis.call('EXPIRE', record, ttl_s)
for _, index in ipairs({all, waiting}) do
  redis.call('ZADD', index, now, id)
  keep(index, record)
end
-- The oldest names whose records have expired.
for _, name in ipairs(redis.call('ZRANGE', all, 0, most_forgotten - 1)) do
  if redis.call('EXISTS', prefix .. name) == 1 then break end
  redis.call('ZREM', all, name)
  redis.call('ZREM', waiting, name)
end
return digest .. ' ' .. id
