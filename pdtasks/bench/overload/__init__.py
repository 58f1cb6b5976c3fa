"""Ten times more than the stack can serve: does it stay small, honest and fast?"""
