"""How threads of ours send to RabbitMQ: each with its own connection, and a bound on every wait."""
