"""Several LoRA files of one base model: memory holds four layers of all for each thread.

Gives:       Experts.
"""
from pathlib import Path

from lora import Factors
from model.formats.lora_file import FAMILIES, VERSION, LoRAFile, expand, read
from model.tools.command import BadInput
from model.tools.processes import chunks, in_threads

AT_A_TIME = 4    # layers of all experts that a thread reads together
OF_BASE = "base_model_hash", "prediction_type", VERSION


class Experts:
    """The files, open for reading, sorted by name, so that nothing depends on the order in which
    they are listed; a folder stands for its files. names: of all adapted layers. label: the files'
    names. concepts: what they were trained on; of other programs' files the names. metadata: what
    they say of the base model, and what is merged here.

    Raises BadInput as expand() does; unless there is one weight, or one for each file; and unless
    all files are of one base model, as far as they tell, and a layer's shape is the same in all.
    Layers need not be the same: a file may hold content, and another one style.
    """

    def __init__(self, paths: list[Path], weights: list[float]):
        paths = expand(paths)
        weights = weights * (len(paths) if len(weights) == 1 else 1)
        if len(weights) != len(paths):
            raise BadInput(f"--weights: {len(weights)} numbers for {len(paths)} experts; give one "
                           "each, or one for all")
        pairs = sorted(zip(paths, weights), key=lambda pair: (pair[0].name, pair[0]))
        self.files, self.weights = [LoRAFile(path) for path, _ in pairs], [w for _, w in pairs]
        self.label = ",".join(path.stem for path, _ in pairs)
        self.concepts = [file.metadata.get("concept", file.path.stem) for file in self.files]
        self.metadata = {"concept": self.label,
                         "weights": ",".join(f"{weight:g}" for weight in self.weights)}
        for file in reversed(self.files):
            self.metadata |= {key: file.metadata[key] for key in OF_BASE if key in file.metadata}
        self.shapes = {}    # {layer: (the file that has it first, [O, I])}
        self.families = set()    # that files tell, by the width of their prompts
        for file in self.files:
            self._add(file)
        self.names = list(self.shapes)

    def __len__(self) -> int:
        return len(self.files)

    def _add(self, file: LoRAFile):
        base = self.metadata.get("base_model_hash")
        if file.metadata.get("base_model_hash", base) != base:
            raise BadInput(f"{file.path}: was trained on another base model than others here; "
                           "merge experts that start from one model")
        self.families |= {file.width} & FAMILIES.keys()
        if len(self.families) > 1:
            raise BadInput(f"{file.path}: is for {FAMILIES[file.width][0]}, unlike others here; "
                           "merge experts of one model")
        for name, shape in file.shapes.items():
            other, known = self.shapes.setdefault(name, (file, shape))
            if shape != known:
                raise BadInput(f"{file.path}: {name} is for a layer of shape {shape}, in "
                               f"{other.path} of {known}; merge experts of one model")

    def lora(self, i: int) -> dict[str, Factors]:
        """Expert i, times its weight."""
        return times(self.weights[i], read([self.files[i]], self.names)[0])

    def of_layers(self, work):
        """Yields work(layer, {expert: Factors, times its weight}), of the experts that adapt the
        layer, in the order of names. Several threads read and work."""
        def of_some(names):
            loras = [times(*pair) for pair in zip(self.weights, read(self.files, names))]
            done = []
            for name in names:
                parts = {i: lora[name] for i, lora in enumerate(loras) if name in lora}
                done.append(work(name, parts))
            return done
        for done in in_threads(of_some, chunks(self.names, AT_A_TIME)):
            yield from done


def times(weight: float, lora: dict[str, Factors]) -> dict[str, Factors]:
    return lora if weight == 1 else {
        name: f._replace(up=weight * f.up) for name, f in lora.items()}
