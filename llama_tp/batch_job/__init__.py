"""A file of requests, answered into another file: lines in the input's order, that outlive any end
of the process. The command is `llama_tp.batch`."""
