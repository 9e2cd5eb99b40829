"""`flow.serve()`: its runner pickles the flow object into a process of its own."""

import tree

if __name__ == "__main__":
    tree.root.serve("pickled", limit=8)
