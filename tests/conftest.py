"""Settings of every test, made before anything imports Ray, which reads them once."""

import os

from hypothesis import settings

from udrl import cluster, logs

# A thread that outlives its cluster and calls Ray again would join whatever cluster it finds, be it one that a kill test
# started; when that one dies, Ray ends this whole process with it, without a word.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

# As serve.app has it.
cluster.set_serve_env()

logs.configure()

# No deadline per example: on a busy machine an example's first call may import a library for seconds.
settings.register_profile("udrl", deadline=None)
settings.load_profile("udrl")
