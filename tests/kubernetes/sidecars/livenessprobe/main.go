// Answers over HTTP what a CSI driver answers to Probe, as the sidecar of this name does, with the flags of it that the chart
// uses. The sidecar itself is not published as a Go module.
package main

import (
	"flag"
	"log"
	"net/http"
	"time"

	"ashlar.io/tests/kubernetes/sidecars/identity"
)

func main() {
	driver := flag.String("csi-address", "/run/csi/socket", "socket of the driver")
	health := flag.String("http-endpoint", "", "address of /healthz")
	timeout := flag.Duration("probe-timeout", time.Second, "of a call of Probe")
	flag.Int("v", 0, "taken and not used")
	flag.Parse()

	// The sidecar waits so long for a driver that is not there yet.
	if _, err := identity.Name(*driver, 5*time.Minute); err != nil {
		log.Fatalf("the driver's name: %v", err)
	}
	http.HandleFunc("/healthz", func(answer http.ResponseWriter, _ *http.Request) {
		if err := identity.Probe(*driver, *timeout); err != nil {
			log.Print(err)
			http.Error(answer, err.Error(), http.StatusInternalServerError)
		}
	})
	log.Fatal(http.ListenAndServe(*health, nil))
}
