"""The application of one recipe as a module attribute, the only form that ``serve build`` accepts.

``UDRL_RECIPE=recipes/quickstart.yaml serve build serve.built:app -o my.yaml`` writes a config with every option of the
deployments for editing. A deployment of that config reads UDRL_RECIPE again, on the cluster. ``serve.app:build``, which
serve/config.yaml uses, takes arguments instead.
"""

import os

from serve.app import build

app = build({"recipe": os.environ.get("UDRL_RECIPE", "recipes/quickstart.yaml")})
