-- What the scripts of batches share: one line more in an output or error file.

local function append(record, files, which, text)
  local file = files .. redis.call('HGET', record, which .. '_id') .. ':'
  local parts = tonumber(redis.call('HGET', record, which .. '_parts') or 0)
  if parts == 0 or redis.call('STRLEN', file .. (parts - 1)) >= 2^20 then
    parts = redis.call('HINCRBY', record, which .. '_parts', 1)
  end
  local piece = file .. (parts - 1)
  redis.call('APPEND', piece, text)
  redis.call('PEXPIRE', piece, redis.call('PTTL', record))
  redis.call('HINCRBY', record, which .. '_bytes', #text)
end
