"""Who follows the load with the workers' roles?"""
