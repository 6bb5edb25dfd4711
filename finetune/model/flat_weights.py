"""The trained weights of an adapter as one flat vector, of which the parameters are views.

A slot copies one vector to its device, and a file is written from one copy on the host: each is one
operation, however many layers there are.
"""

from collections.abc import Sequence

import torch


def flatten_weights(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return all weights as one vector on the host [weights].

    Nothing is copied where they are in host memory, in this order, and nothing else is beside them.
    """
    weights = [parameter.detach() for parameter in parameters]
    first = weights[0]
    address = first.data_ptr()
    is_flat = first.device.type == "cpu"
    for each in weights:
        is_flat = is_flat and each.data_ptr() == address and each.is_contiguous()
        address += each.nbytes
    size = sum(each.numel() for each in weights)
    # Memory of this very size holds no other weights, and none of these is in other memory.
    if is_flat and first.untyped_storage().nbytes() == size * first.element_size():
        return first.as_strided((size,), (1,))
    return torch.cat([each.flatten() for each in weights]).cpu()


def separate_views(
    vector: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return a view of a vector for each parameter, as if each had memory of its own.

    PEFT and safetensors copy tensors whose memory is that of other tensors too, before they write
    them.

    Args:
        vector: On the host [weights].
        parameters: Have the shapes.
    """
    # PyTorch gives each array of NumPy's a storage of its own, which keeps all of the memory.
    array = vector.numpy()
    views = []
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        views.append(torch.from_numpy(array[start:stop]).view(parameter.shape))
        start = stop
    return views
