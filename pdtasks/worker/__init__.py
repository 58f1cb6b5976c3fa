"""What one worker process holds, and how our Celery worker differs from a stock one."""
