"""A process without impart_hf: this goes before the script that it runs."""

WITHOUT_IMPART_HF = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "impart_hf":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Blocker())
"""
