"""The application of one recipe as a module's attribute, which is all that ``serve build`` takes.

``UDRL_RECIPE=recipes/quickstart.yaml serve build serve.built:app -o my.yaml`` writes a config with every option of the
deployments to edit. What it deploys reads UDRL_RECIPE again, on the cluster. ``serve.app:build`` takes arguments instead, and
is what serve/config.yaml uses.
"""

import os

from serve.app import build

app = build({"recipe": os.environ.get("UDRL_RECIPE", "recipes/quickstart.yaml")})
