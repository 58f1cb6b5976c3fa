-- End a batch, and its files are there. Returns 0 when it still has lines, or another one tends it.

local record, open, files, input = unpack(KEYS)
local id, token, ttl_s, file_prefix = unpack(ARGV, 1, 4) -- then fields and values

if redis.call('HGET', record, 'token') ~= token then return 0 end
local left = redis.call('LLEN', record .. ':lines') + redis.call('ZCARD', record .. ':running')
if left > 0 then return 0 end
local owner = redis.call('HGET', record, 'owner')
for _, which in ipairs({'output', 'error'}) do
  local parts = tonumber(redis.call('HGET', record, which .. '_parts'))
  if parts then
    local name = redis.call('HGET', record, which .. '_id')
    local file = file_prefix .. name
    redis.call('HSET', file, 'owner', owner, 'purpose', 'batch_output', 'parts', parts,
      'filename', id .. '_' .. which .. '.jsonl', 'created_at', math.floor(now),
      'expires_at', math.floor(now + ttl_s),
      'bytes', redis.call('HGET', record, which .. '_bytes'))
    redis.call('EXPIRE', file, ttl_s)
    for part = 0, parts - 1 do redis.call('EXPIRE', file .. ':' .. part, ttl_s) end
    redis.call('ZADD', files, now, name)
    keep(files, file)
    redis.call('HSET', record, which .. '_file_id', name)
  end
end
redis.call('HSET', record, 'token', '', unpack(ARGV, 5))
redis.call('EXPIRE', record, ttl_s)
for _, behind in ipairs({':lines', ':running', ':held', ':tries'}) do
  redis.call('DEL', record .. behind)
end
redis.call('ZREM', open, id)
redis.call('HDEL', input, 'read by ' .. id)
return 1
