-- Take a batch in. Returns 'ok', 'file' (it is gone), 'batches' or 'memory' (there is no room).

local record, all, open, file = unpack(KEYS)
local prefix, id, ttl_s, most_open, most_memory = unpack(ARGV, 1, 5) -- then fields and values

local parts = tonumber(redis.call('HGET', file, 'parts'))
if not parts then return 'file' end
for _, index in ipairs({open, all}) do -- those that have expired, the oldest first
  for _, name in ipairs(redis.call('ZRANGE', index, 0, 9)) do
    if redis.call('EXISTS', prefix .. name) == 1 then break end
    redis.call('ZREM', index, name)
  end
end
if redis.call('ZCARD', open) >= tonumber(most_open) then return 'batches' end
if not has_room(most_memory, 0) then return 'memory' end
redis.call('HSET', record, unpack(ARGV, 6))
redis.call('EXPIRE', record, ttl_s)
for _, index in ipairs({all, open}) do
  redis.call('ZADD', index, now, id)
  keep(index, record)
end
-- The file stays as long as the batch reads it.
redis.call('HSET', file, 'read by ' .. id, '1')
if redis.call('TTL', file) < tonumber(ttl_s) then
  redis.call('EXPIRE', file, ttl_s)
  for part = 0, parts - 1 do redis.call('EXPIRE', file .. ':' .. part, ttl_s) end
end
return 'ok'
