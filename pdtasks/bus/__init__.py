"""What lies on the bus: replies, signs of life, jobs."""
