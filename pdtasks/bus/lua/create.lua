-- Take a job in, or find the one that came under the same key before. Returns 'digest id', or what
-- there is no room for: 'jobs' or 'memory'.

local record, all, waiting, idempotency = KEYS[1], KEYS[2], KEYS[3], KEYS[4] -- (the last: or none)
local prefix, id, digest, ttl_s, most_forgotten = unpack(ARGV, 1, 5)
local most_waiting, most_memory = unpack(ARGV, 6, 7) -- (a part of maxmemory); then fields and values

local function lacks()
  if redis.call('ZCARD', waiting) >= tonumber(most_waiting) then return 'jobs' end
  if not has_room(most_memory, 0) then return 'memory' end
end

if idempotency then
  local known = redis.pcall('GET', idempotency)
  local of = type(known) == 'string' and string.match(known, '^%x+ (job%-%x+)$')
  -- A job that ends early expires before its key.
  if of and redis.call('EXISTS', prefix .. of) == 1 then return known end
end
local lacking = lacks()
if lacking then return lacking end
if idempotency then
  redis.call('SET', idempotency, digest .. ' ' .. id, 'EX', ttl_s)
end
redis.call('HSET', record, unpack(ARGV, 8))
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
