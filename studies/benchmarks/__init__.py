"""compress_search beside the tools that people use today: same weights, same data, same machine.

``python studies/benchmarks/ratio_selection.py`` is the command. Each tool compresses in a process of its own,
peers that do not live with our dependencies in an environment of their own; what leaves the process is the
shapes of the layers and their weights, so that one judge measures all of them alike.
"""
