"""Does one tenant's pile delay another's question? `pdtasks bench fair`

::

    clients   a tenant who asks now and then, and one who asks for very much
    run       the order of a run: alone, beside jobs, beside requests
    command   the defaults, and what is shown
"""
