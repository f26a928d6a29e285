"""Which attention backend is chosen, and what is said of those that can't run: missing, not for this GPU, or broken."""

import sys

import pytest
import torch

from kdclimb import attention
from kdclimb.attention import BROKEN, MODULES, choose_backend, why_not
from kdclimb.config import AttentionConfig, ConfigError

AUTO = AttentionConfig("auto", False)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu(major, {module: its text}): a GPU of this compute capability, and these packages alone of flash-attn's."""
    attention._flash.cache_clear()

    def call(major, **packages):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
        for name, text in packages.items():
            folder = tmp_path
            for part in name.split("__"):
                folder = folder / part
                folder.mkdir(exist_ok=True)
                (folder / "__init__.py").touch()
            (folder / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    for module, _ in MODULES.values():
        for name in (module, module.split(".")[0]):
            monkeypatch.delitem(sys.modules, name, raising=False)
    yield call
    attention._flash.cache_clear()


def test_on_a_cpu_auto_is_the_reference_and_all_others_say_what_they_need():
    assert choose_backend(AUTO, "cpu") == "reference"
    for name in (*MODULES, "torch_varlen"):
        assert why_not(name, "cpu") == "it needs an NVIDIA GPU"
    with pytest.raises(ConfigError, match="attention.backend: 'torch_varlen' is not allowed.*needs an NVIDIA GPU"):
        choose_backend(AttentionConfig("torch_varlen", False), "cpu")
    with pytest.raises(ConfigError, match="attention.require_flash_attn.*flash_attn_2: it needs an NVIDIA GPU"):
        choose_backend(AttentionConfig("auto", True), "cpu")


def test_packages_that_are_missing_or_not_for_this_gpu(gpu):
    gpu(9)
    assert {why_not(name, "cuda") for name in MODULES} == {"it is not installed"}
    assert choose_backend(AUTO, "cuda") == "torch_varlen"
    gpu(7)
    assert {why_not(name, "cuda") for name in MODULES} == {"it is not for GPUs of compute capability 7.x"}
    with pytest.raises(ConfigError, match="flash_attn_2: it is not for GPUs of compute capability 7.x"):
        choose_backend(AttentionConfig("auto", True), "cuda")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("import a_package_that_it_needs", "ModuleNotFoundError: No module named 'a_package_that_it_needs'"),
        ("", "AttributeError"),  # another version, without what we call
    ],
)
def test_a_broken_package_is_told_and_not_passed_over(gpu, text, said):
    gpu(8, flash_attn__flash_attn_interface=text)
    reason = why_not("flash_attn_2", "cuda")
    assert reason.startswith(BROKEN) and said in reason
    with pytest.raises(ConfigError, match=f"attention.backend: 'auto' is not allowed.*flash_attn_2: {BROKEN}"):
        choose_backend(AUTO, "cuda")
    assert choose_backend(AttentionConfig("torch_varlen", False), "cuda") == "torch_varlen"  # asked for by its name


def test_one_that_has_no_fixed_order_is_told_where_one_is_asked_for(gpu):
    text = "def _flash_attn_fwd(): pass\ndef _flash_attn_bwd(): pass\n"
    gpu(12, flash_attn__cute__interface=text)
    named = AttentionConfig("flash_attn_4", False)
    assert choose_backend(named, "cuda") == choose_backend(AUTO, "cuda") == "flash_attn_4"
    assert choose_backend(AUTO, "cuda", deterministic=True) == "torch_varlen"
    with pytest.raises(ConfigError, match=r"attention\.backend: 'flash_attn_4'.* which train\.deterministic asks for"):
        choose_backend(named, "cuda", deterministic=True)
    gpu(9)
    assert choose_backend(AUTO, "cuda", deterministic=True) == "flash_attn_4"


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("package", [attention._flash_attn_2, attention._flash_attn_4])
def test_the_way_back_is_in_a_fixed_order_where_torch_is_asked_for_one(package, fixed):
    asked = []
    _, backward = package(None, lambda *args, deterministic, **options: asked.append(deterministic))
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(fixed)
    try:
        backward(*torch.ones(6, 2, 2, 8), torch.tensor([0, 2]), 2, 1, 1.0)
    finally:
        torch.use_deterministic_algorithms(was)
    assert asked == [fixed]


def test_a_whole_package_is_chosen(gpu):
    names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    gpu(8, flash_attn__flash_attn_interface="".join(f"def {name}(): pass\n" for name in names))
    assert why_not("flash_attn_2", "cuda") is None
    assert choose_backend(AttentionConfig("auto", True), "cuda") == "flash_attn_2"
