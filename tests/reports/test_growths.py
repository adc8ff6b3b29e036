"""What a certificate tells on the page."""

from aquila_jax.reports import read_run, write_page

from .reading import read
from .synthetic import certificate, stage, write_run


def test_what_a_certificate_measured_is_told(tmp_path):
    told = certificate("latent", True, {"embed_dim": 4}, {"embed_dim": 6})
    told["measured"] = {
        "num_tokens": 254,
        "max_logit_difference": 3.2e-5,
        "kl": 1.5e-9,
        "source_loss": 4.25,
        "grown_loss": 4.25,
    }
    entries = [stage(), stage("wide", "scale_up", method="latent")]
    directory = write_run(tmp_path / "run", entries, certificate=told)
    text = " ".join(read(write_page([read_run(directory)], tmp_path / "report.html")).text)
    assert "a probe of 254 predictions" in text
    assert "KL 1.5e-09 nats, logits at most 3.2e-05 apart" in text
