"""Set-up of all tests."""

import torch

torch.set_num_threads(1)  # small layers: threads cost more than they bring
