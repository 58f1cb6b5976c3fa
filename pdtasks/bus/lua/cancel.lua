-- Tell a job's runner that nobody wants it any more.

local record = KEYS[1]

if redis.call('EXISTS', record) == 1 then redis.call('HSET', record, 'cancel', '1') end
