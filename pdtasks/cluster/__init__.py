"""What runs on this host?  `pdtasks up` starts services and workers, watches and stops them.

::

    placement   which worker gets which core or GPU
    process     one supervised child: own session, log file, identity, stop with a deadline
    probes      is a port free, does a service answer
    rabbitmq    a private RabbitMQ node, every port on loopback
    valkey      private Valkey servers: kv (unix socket) and bus (loopback)
    stack       <home>/stack.json: what runs, for `status`, `down` and workers started by hand
    down        `pdtasks down`: ask the supervisor to stop, and wait
    supervisor  `pdtasks up`: the order of start, watch and stop
    signals     has somebody asked us to stop
    services    broker, bus and kv: private ones started, configured ones asked
    parts       workers, API and Flower: waited for, watched, restarted, drained
    workers     `pdtasks restart` and `pdtasks drain`
    children    commands, settings and folders of workers, API and Flower
    status      `pdtasks status`: the stack's processes and every worker that shows a sign of life
    console     readable lines on a terminal or in a log
"""
