-- Give a line that nobody runs to the runner with this token. Returns batch, line and tries, or nothing.
--
-- Those of batches that ask one of the models in `away`, a JSON list, wait: nobody could run them.
-- While a job waits none is begun.  Of those who have batches, the one gets the next with the fewest
-- lines under way; of his batches that with the fewest; then the oldest.

local open = KEYS[1]
local prefix, token, lease_s, most_memory, jobs_waiting, away = unpack(ARGV) -- (jobs_waiting is only read)
local is_away = {}
for _, model in ipairs(cjson.decode(away)) do is_away[model] = true end

if redis.call('ZCARD', jobs_waiting) > 0 then return nil end
if not has_room(most_memory, 0) then return nil end
local candidates, of_owner = {}, {}
for _, id in ipairs(redis.call('ZRANGE', open, 0, -1)) do
  local record = prefix .. id
  local found = redis.pcall('HMGET', record, 'status', 'owner', 'expires_at', 'model')
  local status, owner, expires_at, model = unpack(found) -- (nothing of what is no record)
  if status == 'in_progress' and tonumber(expires_at) > now then
    local running = #redis.call('ZRANGE', record .. ':running', '(' .. now, '+inf', 'BYSCORE') -- (no others: given back)
    of_owner[owner] = (of_owner[owner] or 0) + running
    local lost = redis.call('ZRANGE', record .. ':running', '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
    local has_line = lost or redis.call('LLEN', record .. ':lines') > 0
    if has_line and not is_away[model or ''] then
      table.insert(candidates, {id = id, owner = owner, running = running, lost = lost})
    end
  end
end
local best
for _, one in ipairs(candidates) do
  local his, theirs = of_owner[one.owner], best and of_owner[best.owner]
  if not best or his < theirs or (his == theirs and one.running < best.running) then best = one end
end
if not best then return nil end
local record = prefix .. best.id
local entry = best.lost or redis.call('LPOP', record .. ':lines')
local number = cjson.decode(entry)[1]
redis.call('ZADD', record .. ':running', now + lease_s, entry)
redis.call('HSET', record .. ':held', number, token)
local tries = redis.call('HINCRBY', record .. ':tries', number, 1)
for _, behind in ipairs({':running', ':held', ':tries'}) do keep(record .. behind, record) end
return {best.id, entry, tries}
