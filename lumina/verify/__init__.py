"""A preset flows in; proof flows out that runs on this machine survive what may happen to them.

Real processes are killed and real files damaged, from outside: nothing in training knows of it.
"""
