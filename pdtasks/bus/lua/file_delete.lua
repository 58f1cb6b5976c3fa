-- Delete a file. Returns 'deleted', 'gone', or the id of a batch that still reads it.

local record, files = KEYS[1], KEYS[2]
local id, batches = ARGV[1], ARGV[2]

local parts = tonumber(redis.call('HGET', record, 'parts'))
if not parts then return 'gone' end
for _, field in ipairs(redis.call('HKEYS', record)) do
  local batch = string.match(field, '^read by (.+)$')
  if batch and redis.call('EXISTS', batches .. batch) == 1 then return batch end
end
for part = 0, parts - 1 do redis.call('UNLINK', record .. ':' .. part) end
redis.call('DEL', record)
redis.call('ZREM', files, id)
return 'deleted'
