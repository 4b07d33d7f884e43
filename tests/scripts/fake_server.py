"""The real HTTP server in front of whatever a command line starts: python fake_server.py
OPTIONS(JSON) COMMAND..."""

import json
import resource
import sys

from llama_tp.arch.errors import UserError
from llama_tp.protocol.defaults import SamplingDefaults
from llama_tp.protocol.order import Limits
from llama_tp.server.api_server import ServerOptions, run
from llama_tp.server.connections import ConnectionLimits
from llama_tp.server.supervisor import Policy
from llama_tp.text.tokenizer import open_tokenizer
from tests.servers import DEMO

options = json.loads(sys.argv[1])
policy = Policy(max_restarts=options.pop("max_restarts", 5), backoff_s=0.05)
defaults = SamplingDefaults(**options.pop("defaults", {}))
if n_files := options.pop("n_files", None):
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, n_files))
limits = Limits(**options.pop("limits", {}))
connections = ConnectionLimits(**options.pop("connections", {}))
try:
    run(
        ServerOptions(
            command=sys.argv[2:],
            name="fake",
            tokenizer=open_tokenizer(None, str(DEMO)),
            port=0,
            policy=policy,
            limits=limits,
            defaults=defaults,
            connections=connections,
            **options,
        )
    )
except UserError as error:
    sys.exit(f"error: {error}")
