"""theria.data needs torch alone until a data set asks for more."""

import subprocess
import sys


def test_optional_packages_are_imported_only_where_they_are_used() -> None:
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'numpy', 'PIL', 'sklearn', 'torchvision'): sys.modules[name] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"  # torch itself warns when numpy is missing
        "from theria.data import ClassDataset, EpisodeSampler, Sinusoid\n"
        "import torch\n"
        "data = ClassDataset(torch.zeros(6, 4, 1, 8, 8, dtype=torch.uint8)).with_rotations()\n"
        "print(EpisodeSampler(data, ways=5, shots=1, queries=2, tasks=3).sample(0).query_x.shape[:2], end=' ')\n"
        "print(Sinusoid(tasks=2).sample(0).query_x.shape[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "torch.Size([3, 10]) 2\n", done.stderr
