"""Networks that are written otherwise than a library would do, against the library's own."""

import torch
import torch.nn.functional as F

from models.family import MatrixConv


def test_a_convolution_as_a_matrix_is_the_same_convolution() -> None:
    torch.manual_seed(0)
    conv, x = MatrixConv(5, 6), torch.randn(3, 5, 7, 4)
    expected = F.relu6(F.conv2d(x, conv.weight, conv.bias, padding=1))
    for network in (conv, conv.to(memory_format=torch.channels_last)):  # type: ignore[call-overload]
        torch.testing.assert_close(network(x), expected)
        torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last)), expected)
