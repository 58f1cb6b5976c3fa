"""How fast are the parts, on this host, beside what limits them? `pdtasks bench …`

::

    kv       KV blocks through Valkey: the method, and what is measured
    links    one connection of each way that is compared
    peer     the other end of the plain sockets, a process of its own
    report   the figures as a table, as ratios and as JSON
    plot     the figures as a picture
    burst    bursts of short requests to a running stack: are all answered?
"""
