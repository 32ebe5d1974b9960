"""Prints a finished run's figures as ModelZoo's scripts do and writes them to FOLDER/<CaseName>.log.

python test/report.py SUMMARY_JSON FOLDER NETWORK KIND SECONDS, where KIND is acc or perf and SECONDS the duration.
"""
import json
import os
import platform
import sys


def main(summary_path, folder, network, kind, seconds):
    with open(summary_path) as f:
        summary = json.load(f)
    case = "{}_bs{}_{}p_{}".format(network, summary["batch_size"], summary["processes"], kind)
    fps, accuracy = "{:.2f}".format(summary["images_per_s"]), "{:.3f}".format(summary["best_acc1"])
    print("Final Performance images/sec : " + fps)
    print("Final Train Accuracy : " + accuracy)
    print("E2E Training Duration sec : " + seconds)
    fields = [("Network", network), ("RankSize", summary["processes"]), ("BatchSize", summary["batch_size"]),
              ("DeviceType", platform.machine()), ("CaseName", case), ("ActualFPS", fps),
              ("TrainingTime", "{:.2f}".format(summary["step_ms"])), ("TrainAccuracy", accuracy),
              ("ActualLoss", "{:.4f}".format(summary["train_loss"])), ("E2ETrainingTime", seconds)]
    with open(os.path.join(folder, case + ".log"), "w") as f:
        f.write("".join("{} = {}\n".format(*field) for field in fields))


if __name__ == "__main__":
    main(*sys.argv[1:])
