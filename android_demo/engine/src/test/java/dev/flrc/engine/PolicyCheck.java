package dev.flrc.engine;

import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;

/** Follows policies step by step: {"policies": […], "steps": [[generated, ms, signal], …]} gives the stages. */
public final class PolicyCheck {
    private static double signal;

    private PolicyCheck() {
    }

    public static void main(String[] arguments) throws Exception {
        try {
            BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
            for (String line = in.readLine(); line != null; line = in.readLine()) {
                byte[] bytes = line.getBytes(StandardCharsets.UTF_8);
                Fields asked = Fields.of(new JsonReader(new ByteArrayInputStream(bytes), "request").value(), "request");
                System.out.println(JsonText.of(stages(asked)));
            }
        } catch (FlrcException e) {
            System.err.println("Error: " + e.getMessage());
            System.exit(2);
        }
    }

    private static List<Integer> stages(Fields asked) throws FlrcException {
        List<StagePolicy> policies = new ArrayList<>();
        for (Fields one : asked.objects("policies")) {
            policies.add(policy(one));
        }
        StagePolicy policy = policies.size() == 1 ? policies.get(0) : new Cheapest(policies.toArray(new StagePolicy[0]));
        List<Integer> stages = new ArrayList<>();
        int stage = policy.promptStage();
        for (Object step : asked.list("steps")) {
            List<?> numbers = (List<?>) step;
            signal = numbers.get(2) == null ? Double.NaN : ((Number) numbers.get(2)).doubleValue();
            stage = policy.next(((Number) numbers.get(0)).intValue(), stage, ((Number) numbers.get(1)).doubleValue());
            stages.add(stage);
        }
        return stages;
    }

    private static StagePolicy policy(Fields one) throws FlrcException {
        switch (one.text("kind")) {
            case "latency":
                return new LatencyBudget(one.real("ms"), one.count("stages", 1));
            case "mean":
                return new MeanBudget(one.real("mean"), one.reals("kept"));
            case "signal":
                return new SignalStages(() -> signal, one.real("hysteresis"), one.reals("thresholds"));
            default:
                throw new FlrcException("there is no such policy");
        }
    }
}
